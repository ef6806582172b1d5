"""Draw the paper's figures from this world's runs: once for light, once for dark."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from ..report.canvas import drawn
from .settings import METHODS
from .store import Point, Record
from .summary import by_method, spread

COLOURS = dict(zip(METHODS, ("#d9534f", "#d98a1f", "#7a9a2e", "#1f9fb4", "#2f81f7", "#9a6fd0"), strict=True))
SEQKL = (("chosen", "chosen_kl"), ("rejected", "rejected_kl"), ("|chosen - rejected|", "margin"))


def draw(records: Iterable[Record], folder: Path, footer: str) -> dict[str, str]:
    """Draw the figures, and return what a page beside the pictures shows of each."""
    groups = by_method(records)
    figures = {
        "frontier": ("Reward against KL: the frontier",
                     "Mean over seeds at each look, and every seed as a faint line. Up and to the left is better.",
                     (8.5, 4.8), _frontier),
        "seqkl": ("Sequential KL(reference || policy) on held-out pairs, in training",
                  "Mean over seeds, shaded from the lowest to the highest seed.", (11, 4.2), _seqkl),
    }  # fmt: skip
    return {
        name: drawn(folder / name, caption, title, footer, inches, partial(draw, groups=groups))
        for name, (title, caption, inches, draw) in figures.items()
    }


def _frontier(canvas: Canvas, groups: dict[str, list[Record]]) -> None:
    axes = canvas.subplots()
    for method, records in groups.items():
        for record in records:
            axes.plot([p.kl for p in record.points], [p.reward for p in record.points], color=COLOURS[method], lw=0.6,
                      alpha=0.35)  # fmt: skip
        kl, reward = (_mean(records, lambda p, name=name: getattr(p, name)) for name in ("kl", "reward"))
        axes.plot(kl, reward, color=COLOURS[method], marker="o", ms=4, label=method)
    axes.set(xlabel="sampled KL(policy || reference), nats per completion", ylabel="mean sentiment of samples")
    axes.set_xscale("symlog", linthresh=1, subs=range(2, 10))  # from 0, and TDPO1 goes far
    axes.xaxis.set_major_formatter("{x:g}")
    canvas.legend(loc="outside right upper")


def _seqkl(canvas: Canvas, groups: dict[str, list[Record]]) -> None:
    panels = canvas.subplots(1, len(SEQKL))
    for axes, (title, name) in zip(panels, SEQKL, strict=True):
        for method, records in groups.items():
            _band(axes, method, records, lambda p, name=name: getattr(p, name), axes is panels[0])
        axes.set(title=title, xlabel="pairs seen", ylabel="nats" if axes is panels[0] else None, ylim=(0, None))
    canvas.legend(loc="outside right upper")


def _band(axes: Axes, method: str, records: list[Record], value: Callable[[Point], float], label: bool) -> None:
    columns = [spread([value(p) for p in points]) for points in _looks(records)]
    at = [points[0].examples for points in _looks(records)]
    axes.plot(at, [s.mean for s in columns], color=COLOURS[method], label=method if label else None)
    axes.fill_between(at, [s.low for s in columns], [s.high for s in columns], color=COLOURS[method], alpha=0.2, lw=0)


def _looks(records: list[Record]) -> list[tuple[Point, ...]]:
    """Return, of every seed, the same look."""
    return list(zip(*(record.points for record in records), strict=True))


def _mean(records: list[Record], value: Callable[[Point], float]) -> list[float]:
    return [spread([value(p) for p in points]).mean for points in _looks(records)]
