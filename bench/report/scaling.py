"""Show what is estimated, not measured (`bench.scaling`), as a figure and a table."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from matplotlib.figure import Figure as Canvas

from .. import scaling
from .canvas import Figure, drawn
from .tables import Table

COLOURS = ("#d98a1f", "#2f81f7", "#1f9fb4")
LINES = ("-", "-", "--")  # two of them lie on one another
SHOWN = (8, 64, 512, 4096)
CAPTION = (
    "Estimated from counted flops and bytes, not measured: a TDPO loss with its backward, as a share of the rate of "
    "its products alone. Left, every rank has its own tokens; right, all ranks share the same number."
)


def draw(folder: Path) -> Figure:
    c = scaling.Cluster()
    footer = (
        f"assumed: {c.flops / 1e12:.0f} Tflop/s a rank, {c.node_bytes / 1e9:.0f} GB/s within a node of {c.node}, "
        f"{c.net_bytes / 1e9:.0f} GB/s between nodes, nothing overlapped"
    )
    title = f"Scaling of the loss, {scaling.MODEL}'s head: an estimate"
    return drawn(folder / "scaling", CAPTION, title, footer, (9.0, 3.8), _panels)


def _panels(canvas: Canvas) -> None:
    panels = canvas.subplots(1, 2, sharey=True)
    works = {f"{scaling.TOKENS_EACH:,} tokens a rank": True, f"{scaling.TOKENS:,} tokens in all": False}
    for axes, (title, grows) in zip(panels, works.items(), strict=True):
        for layout, colour, line in zip(scaling.LAYOUTS, COLOURS, LINES, strict=True):
            found = [scaling.estimate(layout, ranks, _tokens(ranks, grows)) for ranks in scaling.RANKS]
            share = [100 * e.efficiency for e in found]
            axes.plot(scaling.RANKS, share, line, color=colour, marker="o", ms=3.5, label=layout.name)
        axes.set(title=title, xlabel="ranks", xscale="log", xticks=scaling.RANKS[::2], ylim=(0, 102))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.minorticks_off()
    panels[0].set_ylabel("% of the products' rate")
    panels[0].legend(loc="lower left")


def _tokens(ranks: int, grows: bool) -> int:
    return scaling.TOKENS_EACH * ranks if grows else scaling.TOKENS


def table() -> Table:
    spent = [field.name for field in fields(scaling.Estimate) if field.name != "held"]
    cells = []
    for layout in scaling.LAYOUTS:
        for ranks in SHOWN:
            e = scaling.estimate(layout, ranks, scaling.TOKENS_EACH * ranks)
            seconds = (f"{1e3 * getattr(e, name):.3g} ms" for name in spent)
            cells.append(
                (layout.name, f"{ranks:,}", *seconds, f"{100 * e.efficiency:.0f} %", f"{e.held / 1e6:,.0f} MB")
            )
    title = f"estimated: {scaling.MODEL}'s head, {scaling.TOKENS_EACH:,} tokens a rank"
    head = ("ranks are", "ranks", *spent, "of the products' rate", "heads and dW on a rank")
    return Table(title, head, cells, ["`bench/scaling.py` has the model and what it assumes."])
