"""Draw the paper's figures from this world's runs, and the curves of parity: once for light, once for dark."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from ..report.canvas import Figure, drawn
from .settings import METHODS
from .store import Point, Record
from .summary import Parity, by_method, final, over_seeds, parities, spread

COLOURS = dict(zip(METHODS, ("#d9534f", "#d98a1f", "#7a9a2e", "#1f9fb4", "#2f81f7", "#9a6fd0"), strict=True))
LOSS_COLOURS = ("#d9534f", "#2f81f7", "#3f9d6b", "#9a6fd0", "#d98a1f")
SEQKL = (("chosen", "chosen_kl"), ("rejected", "rejected_kl"), ("|chosen - rejected|", "margin"))


def draw(records: Iterable[Record], folder: Path, footer: str) -> list[Figure]:
    """Draw every figure that the records have something for."""
    matplotlib.use("Agg")
    groups, compared = by_method(records), parities(records)
    figures = {
        "frontier": ("Reward against KL: the frontier",
                     "Mean over seeds at each look, and every seed as a faint line. Up and to the left is better.",
                     (8.5, 4.8), partial(_frontier, groups=groups)),
        "seqkl": ("Sequential KL(reference || policy) on held-out pairs, in training",
                  "Mean over seeds, shaded from the lowest to the highest seed.", (11, 4.2),
                  partial(_seqkl, groups=groups)),
        "accuracy": ("Reward accuracy against the entropy of what is generated, where runs end",
                     "Mean over seeds; bars from the lowest to the highest seed.", (9.5, 4.4),
                     partial(_accuracy, groups=groups)),
        "parity": ("The same run with the published formula and with every backend",
                   "Left: the losses lie on one another. Right: how far apart they are, step by step; steps without a "
                   "difference are not drawn.", (11, 4.4), partial(_parity, compared=compared)),
    }  # fmt: skip
    return [
        drawn(folder / name, caption, title, footer, inches, draw)
        for name, (title, caption, inches, draw) in figures.items()
        if (compared if name == "parity" else groups)
    ]


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


def _accuracy(canvas: Canvas, groups: dict[str, list[Record]]) -> None:
    panels = canvas.subplots(1, 2, sharex=True, sharey=True)
    rewards = (("reward with the KL, eq. (5)", "accuracy"), ("reward without it", "accuracy_without_kl"))
    for axes, (title, name) in zip(panels, rewards, strict=True):
        for method, records in groups.items():
            x, y = over_seeds(records, final("entropy")), over_seeds(records, final(name))
            axes.errorbar(x.mean, y.mean, xerr=[[x.mean - x.low], [x.high - x.mean]],
                          yerr=[[y.mean - y.low], [y.high - y.mean]], color=COLOURS[method], fmt="o", ms=7, lw=1.2,
                          label=method if axes is panels[0] else None)  # fmt: skip
        axes.set(title=title, xlabel="entropy of a generated token, nats", ylabel="reward accuracy, held out")
    canvas.legend(loc="outside right upper")


def _parity(canvas: Canvas, compared: list[Parity]) -> None:
    curves, apart = canvas.subplots(1, 2)
    runs = {r.run.name: r for pair in compared for r in (pair.other, pair.one)}
    styles = ("-", "--", "-.", ":", (0, (1, 3)), (0, (5, 4)))
    for i, record in enumerate(runs.values()):
        label = f"{record.run.loss}, {record.run.dtype}"
        curves.plot(range(1, len(record.losses) + 1), record.losses, color=LOSS_COLOURS[i % len(LOSS_COLOURS)],
                    ls=styles[i % len(styles)], lw=1, label=label)  # fmt: skip
    curves.set(title="loss of each batch", xlabel="step")
    curves.legend()
    for i, pair in enumerate(compared):
        shown = [(step, d) for step, d in enumerate(pair.differences, 1) if d > 0]
        if shown:
            apart.plot(*zip(*shown, strict=True), color=LOSS_COLOURS[i % len(LOSS_COLOURS)], lw=0.9, label=name(pair))
    apart.set(title="difference of two losses", xlabel="step", yscale="log")
    apart.legend()


def name(pair: Parity) -> str:
    one, other = pair.one.run, pair.other.run
    return f"{one.loss} {one.dtype} - {other.loss} {other.dtype}"


def _looks(records: list[Record]) -> list[tuple[Point, ...]]:
    """Return, of every seed, the same look."""
    return list(zip(*(record.points for record in records), strict=True))


def _mean(records: list[Record], value: Callable[[Point], float]) -> list[float]:
    return [spread([value(p) for p in points]).mean for points in _looks(records)]
