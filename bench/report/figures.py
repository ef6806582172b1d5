"""Draw the figures from rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, NullFormatter

from ..rows import Row
from ..shapes import SHAPES
from .canvas import drawn
from .tables import label

COLOURS = {  # mid-tones, legible on either paper
    "floor": "#8c959f", "eager": "#d9534f", "compiled": "#d98a1f", "trl": "#9a6fd0", "liger": "#3f9d6b",
    "cce": "#c4608f", "linear_ce": "#7a9a2e", "ours": "#2f81f7", "fused": "#0b4f9e", "tiled": "#1f9fb4",
}  # fmt: skip
MARKERS = {"@all": "o", "@0": "s"}
LESS = "Those with a star, drawn hollow or dotted, compute log-probabilities only: less than TDPO."


def draw(rows: list[Row], folder: Path, device: str) -> list[str]:
    """Draw every figure that the rows have something for. What the gate found wrong is in none."""
    pages = []
    for figure in FIGURES:
        if mine := [row for row in rows if not row.red and figure.wants(row)]:
            footer, do = "\n".join(dict.fromkeys(row.conditions.said for row in mine)), partial(figure.draw, rows=mine)
            stem = folder / f"{device}-{figure.name}"
            pages.append(drawn(stem, figure.caption, figure.title, footer, figure.inches, do))
    return pages


def _paint(row: Row) -> dict:
    marker = next((m for end, m in MARKERS.items() if label(row).endswith(end)), "D")
    hollow = {"markerfacecolor": "none"} if row.partial else {}
    return {"color": COLOURS.get(row.provider, "#818b98"), "marker": marker} | hollow


def _by_label(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    return groups


def _overview(canvas: Canvas, rows: list[Row]) -> None:
    """Plot time against memory: down and to the left is better."""
    timed = [row for row in rows if row.ratio and row.peak_extra_bytes]
    dtypes = list(dict.fromkeys(row.dtype for row in timed))
    panels = canvas.subplots(1, len(dtypes), squeeze=False, sharey=True)[0]
    for axes, dtype in zip(panels, dtypes, strict=True):
        for row in (r for r in timed if r.dtype == dtype):
            axes.plot(row.peak_extra_bytes, row.ratio[0], ls="", label=label(row), **_paint(row), ms=8)
            axes.vlines(row.peak_extra_bytes, row.ratio[1], row.ratio[2], color=_paint(row)["color"], lw=1)
        axes.set(title=dtype, xlabel="peak extra memory", xscale="log", yscale="log")
        axes.axhline(1.0, color=COLOURS["floor"], ls="--", lw=1)
        axes.margins(x=0.1, y=0.1)
        axes.xaxis.set(major_formatter=_bytes, minor_formatter=NullFormatter())
        axes.grid(True, axis="y", which="minor")
    panels[0].set_ylabel("time / bare products")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    _legend(canvas, panels)


def _growth(canvas: Canvas, rows: list[Row]) -> None:
    panels = canvas.subplots(1, 2)
    stopped = [r.T for r in rows if r.provider == "eager" and (r.note or "").startswith("out of memory")]
    for axes, value in zip(panels, (lambda r: r.seconds and r.seconds[0], lambda r: r.peak_extra_bytes), strict=True):
        for name, mine in _by_label(r for r in rows if value(r)).items():
            points = sorted((r.T, value(r)) for r in mine)
            axes.plot(*zip(*points, strict=True), label=name, ls=":" if mine[0].partial else "-", **_paint(mine[0]))
        axes.set(xscale="log", yscale="log", xlabel="rows (tokens)")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if stopped:
            axes.axvline(min(stopped), color=COLOURS["eager"], lw=1, ls=":", label="eager: out of memory")
    panels[0].set(title="time of forward and backward", ylabel="seconds")
    panels[1].set(title="peak memory above inputs and gradients")
    panels[1].yaxis.set_major_formatter(_bytes)
    _legend(canvas, panels)


def _percentages(canvas: Canvas, rows: list[Row]) -> None:
    axes = canvas.subplots()
    for name, mine in _by_label(r for r in rows if r.ratio and r.provider != "floor").items():
        places = [f"{r.shape}, {'bf16' if r.dtype == 'bfloat16' else 'fp32'}" for r in mine]
        axes.plot([100 / r.ratio[0] for r in mine], places, ls="", label=name, **_paint(mine[0]), ms=7)
    axes.axvline(100, color=COLOURS["floor"], ls="--", lw=1)
    axes.set(xlabel="percent of the floor's speed (right is better)", xlim=(0, None))
    axes.invert_yaxis()
    _legend(canvas, [axes])


def _drift(canvas: Canvas, rows: list[Row]) -> None:
    dtypes = sorted({r.dtype for r in rows}, reverse=True)
    grid = canvas.subplots(2, len(dtypes), squeeze=False, sharex=True, sharey="col")
    for column, dtype in zip(zip(*grid, strict=True), dtypes, strict=True):
        for axes, what, value in zip(column, ("the KL", "the KL's gradient"), ("kl_error", "error"), strict=True):
            here = [r for r in rows if r.dtype == dtype and getattr(r, value) is not None]
            for name, mine in _by_label(here).items():
                points = sorted((r.drift, max(getattr(r, value), 1e-9)) for r in mine)
                axes.plot(*zip(*points, strict=True), label=name, **_paint(mine[0]), alpha=0.85)
            axes.axhline(1.0, color=COLOURS["floor"], ls="--", lw=1)
            axes.set(xscale="log", yscale="log", title=f"{what}, {dtype}", ylabel="relative error")
        column[-1].set_xlabel("KL per token between policy and reference (nats)")
    _legend(canvas, grid.flat)


def _legend(canvas: Canvas, panels: Iterable[Axes]) -> None:
    """Name each line or point once."""
    handles, names = zip(*(axes.get_legend_handles_labels() for axes in panels), strict=True)
    once = dict(zip(sum(names, []), sum(handles, []), strict=True))
    canvas.legend(once.values(), once.keys(), loc="outside right upper")


def _bytes(x: float, _: object) -> str:
    return f"{x / 1e9:g} GB" if x >= 1e9 else f"{x / 1e6:g} MB"


def _family(*names: str) -> Callable[[Row], bool]:
    return lambda row: row.shape in SHAPES and SHAPES[row.shape].family in names


class Figure(NamedTuple):
    name: str
    title: str
    caption: str
    inches: tuple[float, float]
    wants: Callable[[Row], bool]
    draw: Callable[[Canvas, list[Row]], None]


FIGURES = (
    Figure("overview", "Time and memory of a TDPO step: forward and backward",
           f"Down and to the left is better. The dashed line is the four matrix products nobody can avoid. {LESS}",
           (9.5, 4.6), lambda r: r.shape in ("cpu-32k", "llama-3.1-8b", "8b, forward + backward"), _overview),
    Figure("rows", "As rows grow",
           f"Time and memory against the number of rows, and where the published formula runs out of it. {LESS}",
           (9.5, 4.8), _family("rows"), _growth),
    Figure("models", "Speed as a percentage of the floor, heads of real models",
           f"100 % would be the bare matrix products. CPUs measure cuts: model/8 has V and D divided by 8. {LESS}",
           (9.5, 5.2), _family("models", "anchor"), _percentages),
    Figure("settings", "Speed as a percentage of the floor, one condition changed at a time",
           f"The same head under other conditions. {LESS}", (9.5, 3.4), _family("settings"), _percentages),
    Figure("drift", "Accuracy as the policy drifts from the reference",
           "Runs start at the left. Above the dashed line the error is larger than the thing itself; errors below "
           "1e-9 are drawn there.", (9.5, 6.4), lambda r: r.drift is not None, _drift),
)  # fmt: skip
