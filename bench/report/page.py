"""The report as one self-contained page, readable in light and in dark."""

from __future__ import annotations

from base64 import b64encode
from html import escape
from pathlib import Path

from .figures import Figure
from .tables import Table

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #ffffff; --faint: #59636e; --rule: #d1d9e0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --faint: #9198a1; --rule: #3d444d; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem;
       margin: 2rem auto; padding: 0 1rem; }
figure { margin: 2rem 0; } figure img { max-width: 100%; height: auto; } figcaption, p.note { color: var(--faint); }
p.note { font-size: 0.85rem; margin: 0.3rem 0; } h3 { margin-top: 2.5rem; font-size: 1rem; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.75rem; text-align: left; border-bottom: 1px solid var(--rule); white-space: nowrap; }
"""


def html(sections: list[tuple[str, list[Figure], list[Table]]], missing: list[str]) -> str:
    body = ["<h1>What was measured</h1>"]
    for device, drawn, found in sections:
        body += [f"<h2>{escape(device)}</h2>", *map(_figure, drawn), *map(_table, found)]
    body += [f"<p>{escape(line)}</p>" for line in missing]
    head = f'<meta charset="utf-8"><title>tdpo-kernels: what was measured</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _figure(figure: Figure) -> str:
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{_inline(figure.dark)}">'
    light = f'<img src="{_inline(figure.light)}" alt="{escape(figure.caption, quote=True)}">'
    return f"<figure><picture>{dark}{light}</picture><figcaption>{escape(figure.caption)}</figcaption></figure>"


def _inline(path: Path) -> str:
    return f"data:image/png;base64,{b64encode(path.read_bytes()).decode()}"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.head)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in line) for line in table.cells)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    notes = "".join(f'<p class="note">{escape(note.lstrip(chr(92)))}</p>' for note in table.notes)
    grid = f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
    return f"<h3>{escape(table.title)}</h3>{grid}{notes}"
