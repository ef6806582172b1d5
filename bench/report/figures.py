"""Draw the figures from rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.transforms import Bbox

from ..rows import Row
from ..shapes import SHAPES
from .canvas import Figure, drawn
from .tables import context, label, size

COLOURS = {  # mid-tones, legible on either paper; ours are one hue
    "floor": "#8c959f", "eager": "#d9534f", "compiled": "#d98a1f", "trl": "#9a6fd0", "liger": "#3f9d6b",
    "cce": "#c4608f", "linear_ce": "#7a9a2e", "ours": "#2f81f7", "fused": "#2f81f7", "tiled": "#1f9fb4",
}  # fmt: skip
PLACES = ((9, 0), (-9, 0), (0, 12), (0, -12), (9, 10), (-9, 10), (9, -10), (-9, -10), (0, 22), (0, -22), (12, 22))
MARKERS = {"@all": "o", "@0": "s"}


def draw(rows: list[Row], folder: Path, device: str) -> list[Figure]:
    """Draw every figure that the rows have something for. What the gate found wrong is in none."""
    matplotlib.use("Agg")
    figures = []
    for make in FIGURES:
        if mine := [row for row in rows if not row.red and make.wants(row)]:
            footer, do = "\n".join(dict.fromkeys(row.conditions.said for row in mine)), partial(make.draw, rows=mine)
            figures.append(drawn(folder / f"{device}-{make.name}", make.caption, make.title, footer, make.inches, do))
    return figures


def _family(name: str) -> Callable[[Row], bool]:
    return lambda row: row.shape in SHAPES and SHAPES[row.shape].family == name


def _paint(row: Row) -> dict:
    marker = next((m for end, m in MARKERS.items() if label(row).split(" ")[0].endswith(end)), "D")
    return {"color": COLOURS.get(row.provider, "#818b98"), "marker": marker}


def _by_label(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    return groups


def _overview(canvas: Canvas, rows: list[Row]) -> None:
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    for axes, dtype in zip(canvas.subplots(1, len(dtypes), squeeze=False)[0], dtypes, strict=True):
        _scatter(axes, [r for r in rows if r.dtype == dtype and r.ratio and r.peak_extra_bytes], dtype)


def _scatter(axes: Axes, rows: list[Row], title: str, places: Sequence[tuple[int, int]] = PLACES) -> None:
    """Plot time against memory: down and to the left is better."""
    axes.set(title=title, xlabel="peak extra memory", ylabel="time / bare products", xscale="log", yscale="log")
    for row in rows:
        paint = _paint(row)
        face = {"markerfacecolor": "none"} if row.partial else {}
        axes.plot([row.peak_extra_bytes], [row.ratio[0]], ls="", **(paint | face), ms=8)
        axes.vlines(row.peak_extra_bytes, row.ratio[1], row.ratio[2], color=paint["color"], lw=1)
    axes.axhline(1.0, color=COLOURS["floor"], ls="--", lw=1)
    axes.margins(x=0.3, y=0.15)
    _bytes(axes.xaxis)
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which(lambda y, _: f"{y:.3g}")
    axes.grid(True, axis="y", which="minor")
    _name(axes, rows, places)


def _name(axes: Axes, rows: list[Row], places: Sequence[tuple[int, int]]) -> None:
    """Put each point's name beside it, at the first place where it covers neither a point nor another name."""
    axes.get_figure().draw_without_rendering()
    points = [axes.transData.transform((r.peak_extra_bytes, r.ratio[0])) for r in rows]
    boxes = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in points]
    for row in rows:
        for place in places:
            right, _ = place
            text = axes.annotate(label(row), (row.peak_extra_bytes, row.ratio[0]), xytext=place, fontsize=8,
                                 textcoords="offset points", color=_paint(row)["color"], va="center",
                                 ha="center" if not right else "left" if right > 0 else "right")  # fmt: skip
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in boxes) or place == places[-1]:
                boxes.append(box)
                break
            text.remove()


def _budget(canvas: Canvas, rows: list[Row]) -> None:
    axes = canvas.subplots()
    timed = [r for r in rows if r.ratio and r.peak_extra_bytes]
    ours = sorted((r for r in timed if r.budget_bytes is not None), key=lambda r: r.budget_bytes)
    axes.plot([r.peak_extra_bytes for r in ours], [r.ratio[0] for r in ours], color=COLOURS["ours"], lw=1.2)
    _scatter(axes, timed, f"{rows[0].dtype}, T={rows[0].T:,}, V={rows[0].V:,}, D={rows[0].D:,}", PLACES[2:])


def _growth(canvas: Canvas, rows: list[Row]) -> None:
    time, memory = canvas.subplots(1, 2)
    for name, mine in _by_label(rows).items():
        style = _paint(mine[0]) | {"ls": ":" if mine[0].partial else "-"}
        for axes, value in ((time, lambda r: r.seconds and r.seconds[0]), (memory, lambda r: r.peak_extra_bytes)):
            points = sorted((r.T, value(r)) for r in mine if value(r))
            if points:
                axes.plot(*zip(*points, strict=True), label=name if axes is time else None, **style)
    time.set(title="time of forward and backward", ylabel="seconds")
    memory.set(title="peak memory above inputs and gradients", ylabel=None)
    for axes in (time, memory):
        axes.set(xscale="log", yscale="log", xlabel="rows (tokens)")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        _wall(axes, rows)
    _bytes(memory.yaxis)
    limit = next((r.conditions.memory_bytes for r in rows if r.conditions.memory_bytes), None)
    if limit:
        memory.axhline(limit, color=COLOURS["eager"], ls="--", lw=1)
        memory.annotate(f"all of the machine's memory, {size(limit)}", (min(r.T for r in rows), limit), xytext=(0, 4),
                        textcoords="offset points", fontsize=8, color=COLOURS["eager"])  # fmt: skip
    canvas.legend(loc="outside right upper")


def _wall(axes: Axes, rows: list[Row]) -> None:
    """Mark where the published formula did not run for lack of memory."""
    stopped = sorted(r.T for r in rows if r.provider == "eager" and (r.note or "").startswith("out of memory"))
    if stopped:
        axes.axvline(stopped[0], color=COLOURS["eager"], lw=1, ls=":")
        axes.text(stopped[0], 0.45, "eager: out of memory ", color=COLOURS["eager"], rotation=90, fontsize=8,
                  ha="right", va="center", transform=axes.get_xaxis_transform())  # fmt: skip


def _percentages(canvas: Canvas, rows: list[Row]) -> None:
    axes = canvas.subplots()
    shapes = list(dict.fromkeys(_place(r) for r in rows))
    for name, mine in _by_label(r for r in rows if r.ratio and r.provider != "floor").items():
        points = [(100 / r.ratio[0], shapes.index(_place(r))) for r in mine]
        face = {"markerfacecolor": "none"} if mine[0].partial else {}
        axes.plot(*zip(*points, strict=True), ls="", label=name, **(_paint(mine[0]) | face), ms=7)
    axes.axvline(100, color=COLOURS["floor"], ls="--", lw=1)
    axes.set(xlabel="percent of the floor's speed (right is better)", xlim=(0, None))
    axes.set_yticks(range(len(shapes)), shapes)
    axes.invert_yaxis()
    canvas.legend(loc="outside right upper")


def _place(row: Row) -> str:
    return f"{row.shape}, {'bf16' if row.dtype == 'bfloat16' else 'fp32'}"


def _errors(canvas: Canvas, rows: list[Row]) -> None:
    dtypes = sorted({r.dtype for r in rows}, reverse=True)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.provider + (" *" if row.partial else ""), []).append(row)
    for axes, dtype in zip(canvas.subplots(1, len(dtypes), squeeze=False, sharey=True)[0], dtypes, strict=True):
        for place, mine in enumerate(groups.values()):
            errors = [r.error for r in mine if r.dtype == dtype]
            axes.plot(errors, [place] * len(errors), ls="", alpha=0.6, color=_paint(mine[0])["color"], marker="o")
        worst = [r.error for r in rows if r.dtype == dtype]
        low, high = 10 ** math.floor(math.log10(min(worst))), 10 ** (math.floor(math.log10(max(worst))) + 1)
        axes.set(xscale="log", xlim=(low, high), title=dtype, xlabel="relative error, worst of loss and gradients")
        axes.xaxis.set_minor_formatter(lambda x, _: "")
        axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()


def _drift(canvas: Canvas, rows: list[Row]) -> None:
    dtypes = sorted({r.dtype for r in rows}, reverse=True)
    grid = canvas.subplots(2, len(dtypes), squeeze=False, sharex=True, sharey="col")
    for column, dtype in zip(zip(*grid, strict=True), dtypes, strict=True):
        for axes, what, value in zip(column, ("the KL", "the KL's gradient"), ("kl_error", "error"), strict=True):
            for name, mine in _by_label(r for r in rows if r.dtype == dtype).items():
                points = sorted((r.drift, max(getattr(r, value), 1e-9)) for r in mine if getattr(r, value) is not None)
                if points:
                    first = axes is grid[0][0]
                    axes.plot(*zip(*points, strict=True), label=name if first else None, **_paint(mine[0]), alpha=0.85)
            axes.axhline(1.0, color=COLOURS["floor"], ls="--", lw=1)
            axes.set(xscale="log", yscale="log", title=f"{what}, {dtype}", ylabel="relative error")
        column[-1].set_xlabel("KL per token between policy and reference (nats)")
    canvas.legend(loc="outside right upper")


def _steps(canvas: Canvas, rows: list[Row]) -> None:
    timed = [r for r in rows if r.seconds]
    contexts = [r for r in rows if r.limit_bytes and r.T]
    panels: Sequence[tuple[str, list[Row], Callable[[Row], float], Callable[[float], str]]] = (
        ("seconds per step", timed, lambda r: r.seconds[0], lambda x: f"{x:.2f} s"),
        ("peak memory of the step", timed, lambda r: r.peak_extra_bytes or 0, lambda x: size(int(x))),
        (f"longest context in {contexts[0].limit_bytes / 1e9:g} GB" if contexts else "", contexts, context,
         lambda x: f"{x:,.0f} tokens"),
    )  # fmt: skip
    for axes, (title, mine, value, text) in zip(canvas.subplots(1, 3), panels, strict=True):
        names, values = [label(r) for r in mine], [value(r) for r in mine]
        bars = axes.barh(names, values, color=[COLOURS.get(r.provider, "#818b98") for r in mine], height=0.6)
        axes.bar_label(bars, [text(x) for x in values], padding=3, fontsize=8)
        axes.set_title(title)
        axes.margins(x=0.25)
        axes.set_xticks([])
        axes.invert_yaxis()
        axes.grid(False)


def _bytes(axis) -> None:
    axis.set_major_formatter(lambda x, _: f"{x / 1e9:g} GB" if x >= 1e9 else f"{x / 1e6:g} MB")


@dataclass(frozen=True)
class Drawing:
    name: str
    title: str
    caption: str
    inches: tuple[float, float]
    wants: Callable[[Row], bool]
    draw: Callable[[Canvas, list[Row]], None]


LESS = "Those with a star, drawn hollow or dotted, compute log-probabilities only: less than TDPO."
FIGURES = (
    Drawing("overview", "Time and memory of a TDPO step: forward and backward",
            f"Down and to the left is better. The dashed line is the four matrix products nobody can avoid. {LESS}",
            (9.5, 4.6), lambda r: r.shape in ("cpu-32k", "llama-3.1-8b", "8b, forward + backward"), _overview),
    Drawing("rows", "As rows grow",
            f"Time and memory against the number of rows, and where the published formula runs out of it. {LESS}",
            (9.5, 4.8), _family("rows"), _growth),
    Drawing("models", "Speed as a percentage of the floor, heads of real models",
            f"100 % would be the bare matrix products. CPUs measure cuts: model/8 has V and D divided by 8. {LESS}",
            (9.5, 5.2), lambda r: _family("models")(r) or _family("anchor")(r), _percentages),
    Drawing("settings", "Speed as a percentage of the floor, one condition changed at a time",
            f"The same head under other conditions. {LESS}", (9.5, 3.4), _family("settings"), _percentages),
    Drawing("budget", "What memory buys: the budget between forward and backward",
            "From keeping nothing to keeping everything, beside the published formula.", (7.5, 4.6),
            _family("budget"), _budget),
    Drawing("errors", "Error against float64",
            "Of each provider at each shape, the worst of the loss's and the gradients' relative errors.",
            (9.5, 4.0), lambda r: bool(r.error) and r.drift is None, _errors),
    Drawing("drift", "Accuracy as the policy drifts from the reference",
            "Runs start at the left. Above the dashed line the error is larger than the thing itself; errors below "
            "1e-9 are drawn there.", (9.5, 6.4), lambda r: r.drift is not None, _drift),
    Drawing("step", "A whole training step: two models, the loss, backward, AdamW",
            "A model with random weights in a plain loop; only the loss differs.", (9.5, 2.8),
            lambda r: r.shape.split(" ")[0] in ("step", "context") and not r.note, _steps),
)  # fmt: skip
