"""Rows as tables: one per shape, in Markdown that is also legible in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .. import roofline, step
from ..conditions import Conditions
from ..providers import BUDGETS
from ..roofline import Ceiling
from ..rows import Row, Spread
from ..shapes import SHAPES, Shape

BUSY = 0.1  # cores; above it times say more about the neighbours
LABELS = {budget: label for label, budget in BUDGETS.items()}
LESS = "computes less: log-probabilities, no KL"


@dataclass(frozen=True)
class Table:
    title: str
    head: tuple[str, ...]
    cells: list[tuple[str, ...]]
    notes: list[str] = field(default_factory=list)


def tables(rows: Iterable[Row]) -> list[Table]:
    """Shapes first, then accuracy against drift, then whole steps."""
    by_shape: dict[str, list[Row]] = {}
    for row in rows:
        by_shape.setdefault(_group(row), []).append(row)
    special = {"drift": _drift, "step": _steps}
    speed = [_speed(group) for name, group in by_shape.items() if name not in special]
    return speed + [make(by_shape[name]) for name, make in special.items() if name in by_shape]


def markdown(found: Iterable[Table]) -> str:
    return "\n\n".join(map(_lines, found)) or "nothing measured yet"


def _lines(table: Table) -> str:
    lines = [table.head, *table.cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    drawn = ["| " + " | ".join(text.ljust(n) for text, n in zip(line, widths, strict=True)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (n + 2) for n in widths) + "|"
    return "\n".join([f"**{table.title}**", "", drawn[0], rule, *drawn[1:], "", *table.notes])


def _group(row: Row) -> str:
    if row.shape.split("-")[0] == "drift":
        return "drift"
    return "step" if row.shape.split(" ")[0] in ("step", "context") else row.shape


def _speed(rows: list[Row]) -> Table:
    first = rows[0]
    asks = f": {SHAPES[first.shape].asks}" if first.shape in SHAPES else ""
    title = f"{first.shape} (T={first.T:,}, V={first.V:,}, D={first.D:,}){asks}"
    columns: dict[str, Callable[[Row], str]] = {
        "dtype": lambda row: row.dtype,
        "provider": label,
        "time / floor (p20-p80)": _ratio,
        "of floor": lambda row: f"{100 / row.ratio[0]:.0f} %" if row.ratio else "-",
        "G": lambda row: f"{units:.1f}" if (units := in_gemms(row)) else "-",
        "time (p20-p80)": lambda row: _time(row.seconds),
        "forward": lambda row: _time(row.forward, spread=False),
        "backward": lambda row: _time(row.backward, spread=False),
        "extra memory": lambda row: size(row.peak_extra_bytes),
        "error vs float64": lambda row: "-" if row.error is None else f"{row.error:.1e}",
    }
    return _table(title, columns, rows, [*_conditions(rows), *_ceilings(rows), *_partial(rows), *_warning(rows)])


def _drift(rows: list[Row]) -> Table:
    columns: dict[str, Callable[[Row], str]] = {
        "KL per token (nats)": lambda row: "-" if row.drift is None else f"{row.drift:.1e}",
        "dtype": lambda row: row.dtype,
        "provider": label,
        "error of the KL": lambda row: _why(row) if row.kl_error is None else f"{row.kl_error:.1e}",
        "error of its gradient": lambda row: "-" if row.error is None else f"{row.error:.1e}",
    }
    first = rows[0]
    title = f"accuracy as the policy drifts from the reference (T={first.T:,}, V={first.V:,}, D={first.D:,})"
    return _table(title, columns, rows, _conditions(rows))


def _steps(rows: list[Row]) -> Table:
    """A context's length is what was found, so the two kinds of rows share columns but not what T means."""

    def longest(row: Row) -> str:
        if row.limit_bytes is None:
            return "-"
        return f"{context(row):,} tokens in {size(row.limit_bytes)}" if row.T else _why(row)

    columns: dict[str, Callable[[Row], str]] = {
        "what": lambda row: row.shape,
        "provider": label,
        "tokens": lambda row: f"{row.T:,}",
        "step (p20-p80)": lambda row: _time(row.seconds) if row.seconds else _why(row),
        "extra memory": lambda row: size(row.peak_extra_bytes),
        "longest context": longest,
    }
    title = "a whole training step: two models, the loss, backward, AdamW"
    return _table(title, columns, rows, [*_conditions(rows), *_warning(rows)])


def context(row: Row) -> int:
    """Tokens of each sequence of a step's batch."""
    return row.T // (2 * step.SIZES[row.shape.split(" ", 1)[1]].pairs)


def _table(title: str, columns: dict[str, Callable[[Row], str]], rows: list[Row], notes: list[str]) -> Table:
    """Without the columns that say nothing."""
    cells = [tuple(cell(row) for cell in columns.values()) for row in rows]
    shown = [i for i, column in enumerate(zip(*cells, strict=True)) if set(column) != {"-"}]
    head = tuple(name for i, name in enumerate(columns) if i in shown)
    return Table(title, head, [tuple(line[i] for i in shown) for line in cells], notes)


def label(row: Row) -> str:
    """The name it was asked for by."""
    name = row.provider
    if row.budget_bytes is not None:
        name += f"@{LABELS.get(row.budget_bytes, row.budget_bytes)}"
    return name + (" *" if row.partial else "")


def in_gemms(row: Row) -> float | None:
    """The time in units of one product of 2 T V D flops at the rate of the run's own large product."""
    if not (row.seconds and row.ceiling):
        return None
    return row.seconds[0] * row.ceiling[0] / roofline.gemm_flops(_shape(row))


def _shape(row: Row) -> Shape:
    """As much of it as roofline counts: all rows are valid in it, as many as counted."""
    rows = row.rows if row.rows is not None else row.T
    return Shape(row.shape, rows, row.V, row.D, "", (), row.rounds, pairs=1, trainable=row.trainable)


def _ratio(row: Row) -> str:
    """Return the time in units of the floor, and what is wrong with it."""
    if not row.ratio:
        return _why(row)
    return _spread(row.ratio, 1.0, 2) + (f" {_why(row)}" if row.red else "")


def _why(row: Row) -> str:
    return f"RED {row.note}" if row.red else row.note or "-"


def _time(seconds: Spread | None, spread: bool = True) -> str:
    if not seconds:
        return "-"
    unit, scale = ("s", 1.0) if seconds[0] >= 1 else ("ms", 1e3)
    return f"{_spread(seconds, scale, 2) if spread else f'{seconds[0] * scale:.2f}'} {unit}"


def _spread(values: Spread, scale: float, digits: int) -> str:
    median, low, high = (f"{value * scale:.{digits}f}" for value in values)
    return f"{median} ({low}-{high})"


def size(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _conditions(rows: list[Row]) -> list[str]:
    """One line for each set of conditions among the rows."""
    return [
        f"{_place(c)}, {c.date[:10]}, {rounds} rounds. Extra memory: above inputs and gradients."
        for c, rounds in dict.fromkeys((row.conditions, row.rounds) for row in rows)
    ]


def _place(c: Conditions) -> str:
    packages = f", {c.packages}" if c.packages else ""
    commit = f"commit {c.commit}{' + changes' if c.dirty else ''}"
    return f"{c.device}, {c.threads} threads, torch {c.torch}, Python {c.python}{packages}, {commit}"


def _ceilings(rows: list[Row]) -> list[str]:
    """What the machine gave in that run, and what the roofline makes of it."""
    told, beaten = {}, {}
    for row in rows:
        if row.ceiling:
            best, ceiling = roofline.seconds(_shape(row), row.dtype, Ceiling(*row.ceiling)), Ceiling(*row.ceiling)
            told[row.dtype] = (
                f"{row.dtype}: a large product ran at {ceiling.flops / 1e9:,.0f} Gflop/s, a large copy at "
                f"{ceiling.bytes / 1e9:.1f} GB/s; at these rates a step takes {_time((best,) * 3, False)} or more"
            )
            if row.seconds and row.seconds[0] < best and not row.partial:
                beaten[row.dtype] = (
                    ", which was beaten: they were of `torch.mm`, which is not the fastest here, or had a slow moment"
                )
    return [f"{said}{beaten.get(dtype, '')}." for dtype, said in told.items()]


def _partial(rows: list[Row]) -> list[str]:
    return [f"\\* {LESS}."] if any(row.partial for row in rows) else []


def _warning(rows: list[Row]) -> list[str]:
    busy = max(row.busy_cores or 0.0 for row in rows)
    return [f"Measure again: other processes kept {busy:.1f} cores busy."] if busy > BUSY else []
