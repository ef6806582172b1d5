"""Say what came out: of each stage a table, an item a line with its facts, and measured rows as the report has them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..report.tables import Table, markdown, size, tables
from ..rows import parse

DRY = "DRY RUN: a CPU, tiny shapes, Triton's interpreter. No number below means anything.\n\n"
KINDS = ("ok", "red", "failed", "skipped", "stopped")
WIDE = 120  # characters; a table with longer cells is a list
Note = dict[str, Any]


def text(notes: list[Note], dry: bool) -> str:
    stages = dict.fromkeys(note["key"][0] for note in notes)
    parts = [stage(name, [note for note in notes if note["key"][0] == name]) for name in stages]
    return (DRY if dry else "") + "\n\n".join([counts(notes), *parts]) + "\n"


def counts(notes: list[Note]) -> str:
    """Return how many items of each stage went how, and what is wrong."""
    cells, wrong = [], [n for n in notes if n["status"] not in ("ok", "skipped")]
    for name in dict.fromkeys(note["key"][0] for note in notes):
        mine = [note for note in notes if note["key"][0] == name]
        number = (str(sum(note["status"] == kind for note in mine)) for kind in KINDS)
        cells.append((name, *number, f"{sum(note['seconds'] for note in mine):.0f} s"))
    told = [f"* {n['key'][0]}, {n['key'][1]}: {n['status']}: {n['message'][:200]}" for n in wrong]
    return markdown([Table("how it went", ("stage", *KINDS, "time"), cells, told)])


def stage(name: str, notes: Iterable[Note]) -> str:
    measured = [parse(row) for note in notes for row in note["facts"].get("rows", [])]
    if measured:  # the floor of each contender was timed in the same rounds; the last one's is shown
        return markdown(tables({(row.shape, row.key): row for row in measured}.values()))
    lines = [(n["key"][1], n["status"], "; ".join(filter(None, [n["message"], *_said(n["facts"])]))) for n in notes]
    if max((len(said) for *_, said in lines), default=0) < WIDE:
        return markdown([Table(name, ("item", "", "what came out"), lines)])
    return "\n".join([f"**{name}**", "", *(f"* {item}: {status}: {said}" for item, status, said in lines)])


def _said(facts: Note) -> list[str]:
    return [f"{name} {plain(value)}" for name, value in facts.items()]


def plain(value: object) -> str:
    if isinstance(value, (dict, list, tuple)):
        return ", ".join(_said(value) if isinstance(value, dict) else map(plain, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return size(value) if isinstance(value, int) and value >= 10**6 else str(value)
