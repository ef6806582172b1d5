"""Rows as tables: one per shape, in Markdown that is also legible in a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from .providers import PROVIDERS
from .rows import Row, Spread
from .shapes import SHAPES

COLUMNS = ("dtype", "provider", "time / floor (p20-p80)", "time (p20-p80)", "extra memory", "error vs float64")

BUSY = 0.1  # cores; above it times say more about the neighbours


def tables(rows: Iterable[Row]) -> str:
    by_shape: dict[str, list[Row]] = {}
    for row in rows:
        by_shape.setdefault(row.shape, []).append(row)
    return "\n\n".join(_table(group) for group in by_shape.values()) or "nothing measured yet"


def _table(rows: list[Row]) -> str:
    first = rows[0]
    asks = f": {SHAPES[first.shape].asks}" if first.shape in SHAPES else ""
    title = f"**{first.shape}** (T={first.T:,}, V={first.V:,}, D={first.D:,}){asks}"
    cells = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(text.ljust(n) for text, n in zip(line, widths, strict=True)) + " |" for line in cells]
    rule = "|" + "|".join("-" * (n + 2) for n in widths) + "|"
    return "\n".join([title, "", lines[0], rule, *lines[1:], "", *_conditions(rows), *_warning(rows)])


def _warning(rows: list[Row]) -> list[str]:
    busy = max(row.busy_cores or 0.0 for row in rows)
    return [f"Measure again: other processes kept {busy:.1f} cores busy."] if busy > BUSY else []


def _cells(row: Row) -> tuple[str, ...]:
    verdict = f"RED {row.note}" if row.red else row.note or "-"
    ratio = _spread(row.ratio, 1.0, 2) if row.ratio else verdict
    unit, scale = ("s", 1.0) if row.seconds and row.seconds[0] >= 1 else ("ms", 1e3)
    seconds = f"{_spread(row.seconds, scale, 2)} {unit}" if row.seconds else "-"
    error = "-" if row.error is None else f"{row.error:.1e}"
    return row.dtype, _provider(row), ratio, seconds, size(row.peak_extra_bytes), error


def _provider(row: Row) -> str:
    """The name it was asked for by, as long as that still means the same budget."""
    if row.budget_bytes is None:
        return row.provider
    names = (name for name, p in PROVIDERS.items() if getattr(p, "budget", None) == row.budget_bytes)
    return next(names, f"{row.provider}@{row.budget_bytes}")


def _spread(values: Spread, scale: float, digits: int) -> str:
    median, low, high = (f"{value * scale:.{digits}f}" for value in values)
    return f"{median} ({low}-{high})"


def size(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _conditions(rows: list[Row]) -> list[str]:
    """One line for each set of conditions among the rows: a table may have been measured in several runs."""
    seen = dict.fromkeys((row.conditions, row.rounds) for row in rows)
    return [
        f"{c.device}, {c.threads} threads, torch {c.torch}, Python {c.python}, commit {c.commit}"
        f"{' + changes' if c.dirty else ''}, {c.date[:10]}, {rounds} rounds. Extra memory: above inputs and gradients."
        for c, rounds in seen
    ]
