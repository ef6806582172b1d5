"""Write what the demo leaves behind: a table, a figure, and which backend did the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from tdpo_loop import Metrics

from tdpo_kernels.backends import availability, choose

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a renderer that needs no display)


@dataclass
class History:
    """Metrics by step: of each training batch, and now and then of all held-out pairs (step 0 is before TDPO)."""

    training: list[tuple[int, Metrics]] = field(default_factory=list)
    held_out: list[tuple[int, Metrics]] = field(default_factory=list)


def backend_line(backend: str, device: torch.device) -> str:
    name, _ = choose(backend, device)
    why = "the leanest that runs here" if backend == "auto" else "asked for by name"
    what = availability(device)[name].removeprefix("available: ")
    return f"The loss was computed by backend {name}, {why}: {what}."


def table(history: History, pairs: int, sentiment: tuple[float, float] | None = None, samples: int = 0) -> str:
    """Before and after TDPO, all measured on what TDPO was not trained on."""
    before, after = history.held_out[0][1], history.held_out[-1][1]
    rows = [
        ("loss", f"{before.loss:.4f}", f"{after.loss:.4f}"),
        ("reward accuracy", f"{before.accuracy:.1%}", f"{after.accuracy:.1%}"),
        ("SeqKL chosen (nats)", f"{before.chosen_kl:.3f}", f"{after.chosen_kl:.3f}"),
        ("SeqKL rejected (nats)", f"{before.rejected_kl:.3f}", f"{after.rejected_kl:.3f}"),
    ]
    if sentiment is not None:
        rows.append((f"mean sentiment of {samples} samples", *(f"{value:+.3f}" for value in sentiment)))
    head = (f"{pairs} held-out pairs", "before", "after")
    return "\n".join(f"{name:<34}{old:>10}{new:>10}" for name, old, new in (head, ("-" * 34, "-" * 8, "-" * 8), *rows))


def plot(history: History, path: Path, title: str) -> None:
    """Training batches as faint lines, held-out pairs as dots."""
    panels: Sequence[tuple[str, dict[str, str]]] = (
        ("loss", {"loss": "loss"}),
        ("reward accuracy", {"accuracy": "accuracy"}),
        ("SeqKL to the reference (nats)", {"chosen_kl": "chosen", "rejected_kl": "rejected"}),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 4), layout="constrained")
    for axis, (label, names) in zip(axes, panels, strict=True):
        for color, (name, series) in zip(("tab:blue", "tab:red"), names.items(), strict=False):
            prefix = f"{series}, " if len(names) > 1 else ""
            axis.plot(*_curve(history.training, name), color=color, alpha=0.35, lw=1, label=f"{prefix}training batch")
            axis.plot(*_curve(history.held_out, name), "o-", color=color, ms=4, lw=1.5, label=f"{prefix}held out")
        axis.set(xlabel="TDPO step", ylabel=label)
        axis.set_ylim(bottom=0, top=1.03 if name == "accuracy" else None)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curve(points: Sequence[tuple[int, Metrics]], name: str) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [getattr(values, name) for _, values in points]
