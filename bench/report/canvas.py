"""Put a drawing on a canvas, once on light and once on dark paper."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure as Canvas

THEMES = {
    "light": {"paper": "#ffffff", "ink": "#1f2328", "faint": "#818b98", "rule": "#d1d9e0"},
    "dark": {"paper": "#0d1117", "ink": "#e6edf3", "faint": "#7d8590", "rule": "#30363d"},
}


def drawn(
    stem: Path, caption: str, title: str, footer: str, inches: tuple[float, float], draw: Callable[[Canvas], None]
) -> str:
    """Save what `draw` puts on a canvas, once on each paper, and return what a page beside the pictures shows."""
    for theme, colours in THEMES.items():
        with matplotlib.rc_context(_style(colours)):
            canvas = Canvas(figsize=inches, layout="constrained")
            draw(canvas)
            canvas.suptitle(title, x=0.01, ha="left", fontweight="bold")
            canvas.supxlabel(footer, x=0.01, ha="left", fontsize=7, color=colours["faint"])
            canvas.savefig(stem.with_name(f"{stem.name}-{theme}.png"), dpi=160, metadata={"Software": None})
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{stem.name}-dark.png">'
    return f'<picture>{dark}<img alt="{caption}" src="{stem.name}-light.png"></picture>\n\n{caption}'


def _style(colours: dict[str, str]) -> dict:
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), colours["ink"])
    paper = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), colours["paper"])
    return ink | paper | {
        "axes.edgecolor": colours["faint"], "grid.color": colours["rule"], "axes.grid": True, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left",
        "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False,
        "legend.labelcolor": colours["ink"], "font.size": 9, "lines.linewidth": 1.8, "lines.markersize": 5,
        "figure.titlesize": 11, "grid.linewidth": 0.6,
    }  # fmt: skip
