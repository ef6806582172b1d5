"""Show rows as tables: one per shape or study, in Markdown that is also legible in a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .. import scaling
from ..providers import BUDGETS
from ..rows import Row, Spread
from ..shapes import KERNELS, OURS, SHAPES

CLIFF = 3  # times a contiguous twin, law 7
BUSY = 0.1  # cores; above it times say more about the neighbours
LABELS = {budget: label for label, budget in BUDGETS.items()}
STUDIES = {  # their shapes are shown together
    "strided": "the same numbers in other layouts",
    "drift": "accuracy as the policy drifts from the reference",
    "step": "a whole training step: two models, the loss, backward, AdamW",
    "context": "the longest sequences whose step fits",
}


@dataclass(frozen=True)
class Table:
    title: str
    head: tuple[str, ...]
    cells: list[tuple[str, ...]]
    notes: list[str] = field(default_factory=list)


def tables(rows: Iterable[Row]) -> list[Table]:
    """Return single shapes first, then the studies."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        study = _study(row)
        groups.setdefault(study if study in ("drift", "step", "context") else row.shape.split("/")[0], []).append(row)
    return [_table(group) for group in sorted(groups.values(), key=lambda group: bool(_study(group[0])))]


def _study(row: Row) -> str:
    kind = re.split("[ -]", row.shape)[0]
    return kind if kind in STUDIES else ""


def _table(rows: list[Row]) -> Table:
    """Make a table without the columns that say nothing."""
    several, slower = len({row.shape for row in rows}) > 1, beside_twins(rows)
    columns = {"shape": lambda row: row.shape if several else "-"} | COLUMNS
    columns["time / contiguous"] = lambda row: f"{slower[row]:.2f}" if row in slower else "-"
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    shown = {name: column for name, column in cells.items() if set(column) != {"-"}}
    return Table(_title(rows), tuple(shown), list(zip(*shown.values(), strict=True)), _notes(rows))


def beside_twins(rows: list[Row]) -> dict[Row, float]:
    """Return how many times as long each layout took as its contiguous twin of the same run."""
    timed = {(row.shape, row.key[1:], row.conditions): row.seconds[0] for row in rows if row.seconds}
    twin = {row: timed.get((f"{row.shape.split('/')[0]}/contiguous", row.key[1:], row.conditions)) for row in rows}
    return {row: row.seconds[0] / seconds for row, seconds in twin.items() if row.seconds and seconds}


def cliffs(rows: list[Row]) -> list[str]:
    """Return a line for each layout in which this library breaks law 7."""
    ours = {row: slower for row, slower in beside_twins(rows).items() if f"{row.provider}@0" in OURS + KERNELS}
    return [f"RED: {row.shape}, {row.dtype}, {label(row)} takes {slower:.1f} x the time of its contiguous twin, law 7 "
            f"allows {CLIFF}." for row, slower in ours.items() if slower > CLIFF]  # fmt: skip


def _title(rows: list[Row]) -> str:
    first, study = rows[0], _study(rows[0])
    asks = STUDIES.get(study) or (SHAPES[first.shape].asks if first.shape in SHAPES else "")
    size = f"(T={first.T:,}, V={first.V:,}, D={first.D:,})"
    return f"{study or first.shape}{'' if study == 'context' else f' {size}'}{f': {asks}' if asks else ''}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "KL per token (nats)": lambda row: _number(row.drift),
    "dtype": lambda row: row.dtype,
    "provider": lambda row: label(row),
    "time / floor (p20-p80)": lambda row: _spread(row.ratio, 1.0) if row.ratio else "-",
    "of floor": lambda row: f"{100 / row.ratio[0]:.0f} %" if row.ratio else "-",
    "G": lambda row: f"{units:.1f}" if (units := in_gemms(row)) else "-",
    "time (p20-p80)": lambda row: _time(row.seconds),
    "forward": lambda row: _time(row.forward, spread=False),
    "backward": lambda row: _time(row.backward, spread=False),
    "longest sequences": lambda row: f"{context(row):,} tokens in {size(row.limit_bytes)}" if row.limit_bytes else "-",
    "extra memory": lambda row: size(row.peak_extra_bytes),
    "error of the KL": lambda row: _number(row.kl_error),
    "error vs float64": lambda row: _number(row.error),
    "remark": lambda row: f"RED {row.note}" if row.red else row.note or "-",
}


def label(row: Row) -> str:
    """Return the name a provider was asked for by."""
    budget = "" if row.budget_bytes is None else f"@{LABELS.get(row.budget_bytes, row.budget_bytes)}"
    return row.provider + budget + (" *" if row.partial else "")


def context(row: Row) -> int:
    """Return the tokens of each sequence of a step's batch."""
    return row.T // (2 * SHAPES[row.shape].pairs)


def in_gemms(row: Row) -> float | None:
    """Return the time in units of one product of 2 T V D flops at the rate of the run's own large product."""
    if not (row.seconds and row.ceiling):
        return None
    return row.seconds[0] * row.ceiling[0] / (2 * (row.T if row.rows is None else row.rows) * row.V * row.D)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _time(seconds: Spread | None, spread: bool = True) -> str:
    if not seconds:
        return "-"
    unit, scale = ("s", 1.0) if seconds[0] >= 1 else ("ms", 1e3)
    return f"{_spread(seconds, scale) if spread else f'{seconds[0] * scale:.2f}'} {unit}"


def _spread(values: Spread, scale: float) -> str:
    median, low, high = (f"{value * scale:.2f}" for value in values)
    return f"{median} ({low}-{high})"


def size(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _notes(rows: list[Row]) -> list[str]:
    """Say under what conditions the rows were measured, what the machine gave, and what to be careful of."""
    runs = dict.fromkeys((row.conditions, row.rounds) for row in rows)
    rates = {row.dtype: row.ceiling for row in rows if row.ceiling}
    busy = max(row.busy_cores or 0.0 for row in rows)
    notes = [f"{c.said}, {n} rounds. Extra memory: above inputs and gradients." for c, n in runs] + cliffs(rows)
    notes += [
        f"{dtype}: a large product ran at {flops / 1e9:,.0f} Gflop/s, a large copy at {moved / 1e9:.1f} GB/s."
        for dtype, (flops, moved) in rates.items()
    ]
    notes += ["\\* computes less: log-probabilities, no KL."] if any(row.partial for row in rows) else []
    return notes + ([f"Measure again: other processes kept {busy:.1f} cores busy."] if busy > BUSY else [])


def estimated() -> Table:
    """Show what is estimated, not measured (`bench.scaling`)."""
    cells = []
    for v in scaling.VOCABULARY:
        for ranks in scaling.RANKS:
            spent = scaling.estimate(ranks, v)
            share = spent["products"] / sum(spent.values())
            cells.append((f"{v}", f"{ranks:,}", *(f"{1e3 * x:.3g} ms" for x in spent.values()), f"{100 * share:.0f} %"))
    head = ("ranks that share a vocabulary", "ranks", *spent, "of the products' rate")
    title = f"estimated, not measured: {scaling.MODEL}'s head, {scaling.TOKENS:,} tokens a rank"
    return Table(title, head, cells, ["`bench/scaling.py` has the model and what it assumes."])


def markdown(found: Iterable[Table]) -> str:
    return "\n\n".join(map(_lines, found)) or "nothing measured yet"


def _lines(table: Table) -> str:
    lines = [table.head, *table.cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    drawn = ["| " + " | ".join(text.ljust(n) for text, n in zip(line, widths, strict=True)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (n + 2) for n in widths) + "|"
    return "\n".join([f"**{table.title}**", "", drawn[0], rule, *drawn[1:], "", *table.notes])
