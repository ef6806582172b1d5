"""Show rows as tables: one per shape, in Markdown that is also legible in a terminal."""

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
Columns = dict[str, Callable[[Row], str]]


@dataclass(frozen=True)
class Table:
    title: str
    head: tuple[str, ...]
    cells: list[tuple[str, ...]]
    notes: list[str] = field(default_factory=list)


def tables(rows: Iterable[Row]) -> list[Table]:
    """Return shapes first, then layouts beside each other, accuracy against drift, and whole steps."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        kind, _, rest = row.shape.partition("-" if row.shape.startswith(("drift", "strided")) else " ")
        kind = {"context": "step"}.get(kind, kind)
        name = rest.split("/")[0] if kind == "strided" else kind
        groups.setdefault((kind, name) if kind in SPECIAL else ("", row.shape), []).append(row)
    speed = [_speed(group) for (kind, _), group in groups.items() if not kind]
    return speed + [
        make(group) for name, make in SPECIAL.items() for (kind, _), group in groups.items() if kind == name
    ]


def markdown(found: Iterable[Table]) -> str:
    return "\n\n".join(map(_lines, found)) or "nothing measured yet"


def _lines(table: Table) -> str:
    lines = [table.head, *table.cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    drawn = ["| " + " | ".join(text.ljust(n) for text, n in zip(line, widths, strict=True)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (n + 2) for n in widths) + "|"
    return "\n".join([f"**{table.title}**", "", drawn[0], rule, *drawn[1:], "", *table.notes])


def _size(row: Row) -> str:
    return f"(T={row.T:,}, V={row.V:,}, D={row.D:,})"


def _speed(rows: list[Row]) -> Table:
    first = rows[0]
    asks = f": {SHAPES[first.shape].asks}" if first.shape in SHAPES else ""
    columns: Columns = {
        "dtype": lambda row: row.dtype,
        "provider": label,
        "time / floor (p20-p80)": _ratio,
        "of floor": lambda row: f"{100 / row.ratio[0]:.0f} %" if row.ratio else "-",
        "G": lambda row: f"{units:.1f}" if (units := in_gemms(row)) else "-",
        "time (p20-p80)": lambda row: _time(row.seconds),
        "forward": lambda row: _time(row.forward, spread=False),
        "backward": lambda row: _time(row.backward, spread=False),
        "extra memory": lambda row: size(row.peak_extra_bytes),
        "error vs float64": lambda row: _number(row.error),
    }
    partial = [f"\\* {LESS}."] if any(row.partial for row in rows) else []
    notes = [*_conditions(rows), *_ceilings(rows), *partial, *_warning(rows)]
    return _table(f"{first.shape} {_size(first)}{asks}", columns, rows, notes)


def _strided(rows: list[Row]) -> Table:
    """Divide each time by the contiguous twin's: law 7 allows 3."""
    twins = {(row.dtype, label(row)): row for row in rows if row.shape.endswith("/contiguous")}

    def beside(row: Row) -> str:
        twin = twins.get((row.dtype, label(row)))
        return f"{row.seconds[0] / twin.seconds[0]:.2f}" if twin and twin.seconds and row.seconds else _why(row)

    columns: Columns = {
        "layout": lambda row: row.shape.split("/")[1],
        "dtype": lambda row: row.dtype,
        "provider": label,
        "time / contiguous": beside,
        "time / floor (p20-p80)": _ratio,
        "time (p20-p80)": lambda row: _time(row.seconds),
        "extra memory": lambda row: size(row.peak_extra_bytes),
    }
    notes = [*_conditions(rows), *_warning(rows)]
    return _table(f"the same numbers in other layouts {_size(rows[0])}", columns, rows, notes)


def _drift(rows: list[Row]) -> Table:
    columns: Columns = {
        "KL per token (nats)": lambda row: _number(row.drift),
        "dtype": lambda row: row.dtype,
        "provider": label,
        "error of the KL": lambda row: _why(row) if row.kl_error is None else _number(row.kl_error),
        "error of its gradient": lambda row: _number(row.error),
    }
    title = f"accuracy as the policy drifts from the reference {_size(rows[0])}"
    return _table(title, columns, rows, _conditions(rows))


def _steps(rows: list[Row]) -> Table:
    """Show steps and contexts. A context's length is what was found: T does not mean the same in both."""

    def longest(row: Row) -> str:
        if row.limit_bytes is None:
            return "-"
        return f"{context(row):,} tokens in {size(row.limit_bytes)}" if row.T else _why(row)

    columns: Columns = {
        "what": lambda row: row.shape,
        "provider": label,
        "tokens": lambda row: f"{row.T:,}",
        "step (p20-p80)": lambda row: _time(row.seconds) if row.seconds else _why(row),
        "extra memory": lambda row: size(row.peak_extra_bytes),
        "longest context": longest,
    }
    title = "a whole training step: two models, the loss, backward, AdamW"
    return _table(title, columns, rows, [*_conditions(rows), *_warning(rows)])


SPECIAL = {"strided": _strided, "drift": _drift, "step": _steps}


def context(row: Row) -> int:
    """Return the tokens of each sequence of a step's batch."""
    return row.T // (2 * step.SIZES[row.shape.split(" ", 1)[1]].pairs)


def _table(title: str, columns: Columns, rows: list[Row], notes: list[str]) -> Table:
    """Make a table without the columns that say nothing."""
    cells = [tuple(cell(row) for cell in columns.values()) for row in rows]
    shown = [i for i, column in enumerate(zip(*cells, strict=True)) if set(column) != {"-"}]
    head = tuple(name for i, name in enumerate(columns) if i in shown)
    return Table(title, head, [tuple(line[i] for i in shown) for line in cells], notes)


def label(row: Row) -> str:
    """Return the name a provider was asked for by."""
    budget = "" if row.budget_bytes is None else f"@{LABELS.get(row.budget_bytes, row.budget_bytes)}"
    return row.provider + budget + (" *" if row.partial else "")


def in_gemms(row: Row) -> float | None:
    """Return the time in units of one product of 2 T V D flops at the rate of the run's own large product."""
    if not (row.seconds and row.ceiling):
        return None
    return row.seconds[0] * row.ceiling[0] / roofline.gemm_flops(_shape(row))


def _shape(row: Row) -> Shape:
    """Return as much of the shape as roofline counts: all rows are valid in it, as many as counted."""
    rows = row.rows if row.rows is not None else row.T
    how = dict(pairs=1, trainable=row.trainable, gradients=row.gradients)
    return Shape(row.shape, rows, row.V, row.D, "", (), row.rounds, **how)


def _ratio(row: Row) -> str:
    """Return the time in units of the floor, and what is wrong with it."""
    return (_spread(row.ratio, 1.0, 2) + (f" {_why(row)}" if row.red else "")) if row.ratio else _why(row)


def _why(row: Row) -> str:
    return f"RED {row.note}" if row.red else row.note or "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


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
    """Return one line for each set of conditions among the rows."""
    found = dict.fromkeys((row.conditions, row.rounds) for row in rows)
    return [f"{_place(c)}, {c.date[:10]}, {n} rounds. Extra memory: above inputs and gradients." for c, n in found]


def _place(c: Conditions) -> str:
    packages = f", {c.packages}" if c.packages else ""
    commit = f"commit {c.commit}{' + changes' if c.dirty else ''}"
    return f"{c.device}, {c.threads} threads, torch {c.torch}, Python {c.python}{packages}, {commit}"


def _ceilings(rows: list[Row]) -> list[str]:
    """Say what the machine gave in that run, and what the roofline makes of it."""
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


def _warning(rows: list[Row]) -> list[str]:
    busy = max(row.busy_cores or 0.0 for row in rows)
    return [f"Measure again: other processes kept {busy:.1f} cores busy."] if busy > BUSY else []
