"""Which rows and columns of a launch are looked at, and what the launch wrote there."""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch
from torch import Tensor

from ...types import Inputs
from ..launch import Launch
from ..slab import Grid
from .finding import Finding
from .truth import Rows

ROWS = COLUMNS = 64


def indices(length: int, block: int, tile: int, count: int, wanted: Iterable[int] = ()) -> list[int]:
    """Up to `count` indices below `length`, sorted: both ends, `wanted`, both sides of edges of tiles, which begin
    anew in every block, and others, always the same ones."""
    choice = random.Random(length)
    if length <= count:
        return list(range(length))
    starts = choice.sample(range(0, length, block), min(count, -(-length // block)))
    edges = {0, length - 1, (length - 1) // block * block}
    edges.add(max(edges) - (max(edges) - (length - 1) // block * block) % tile)  # of the last, partial tile
    picked = edges | {i - 1 for i in edges if i > 0}
    for start in starts:
        edge = start + tile * choice.randrange(-(-min(block, length - start) // tile))
        picked |= {edge, max(edge - 1, 0)} if len(picked) < count // 2 else set()
    for i in wanted:
        picked |= {i} if len(picked) < 3 * count // 4 else set()
    while len(picked) < count:
        picked.add(choice.randrange(length))
    return sorted(picked)


class Sample:
    """Rows of one launch's dz and, in every slab of it that goes by, columns."""

    def __init__(self, inputs: Inputs, grid: Grid, launch: Launch) -> None:
        self.inputs, self.grid, self.launch = inputs, grid, launch
        self.rows = indices(grid.T, grid.R, launch.config.R, ROWS)
        self.device = inputs.policy.hidden.device
        self.at = torch.tensor(self.rows, device=self.device)
        self.labels = inputs.rows.labels_T[self.at].tolist()
        self.columns: dict[int, list[int]] = {}
        self.taken: list[tuple[list[int], int, Tensor, torch.dtype]] = []

    def take(self, rows: slice, cols: slice, dz: Tensor) -> None:
        mine = [n for n, row in enumerate(self.rows) if rows.start <= row < rows.stop]
        if not mine:
            return
        if cols.start not in self.columns:
            labels = [y - cols.start for y in self.labels if cols.start <= y < cols.stop]
            length = cols.stop - cols.start
            self.columns[cols.start] = indices(length, length, max(self.launch.config.C, 1), COLUMNS, labels)
        within = torch.tensor([self.rows[n] - rows.start for n in mine], device=self.device)
        columns = torch.tensor(self.columns[cols.start], device=self.device)
        self.taken.append((mine, cols.start, dz[within][:, columns].double(), dz.dtype))

    @torch.no_grad()
    def compare(self, cotangents: tuple[Tensor | None, ...], scale: float) -> Finding:
        truth = Rows(self.inputs, self.at)
        truth.statistics()
        zero = torch.zeros(len(self.rows), dtype=torch.float64, device=self.device)
        g_3R = torch.stack([zero if g is None else g[self.at].double() for g in cotangents])
        truth.expect("the gradients that came in", torch.isfinite(g_3R).all())
        finding = Finding(truth.odd)
        staged = self.launch.kernel == "staged_dz"
        for mine, first, found, dtype in self.taken:
            columns = [first + c for c in self.columns[first]]
            part = truth.only(torch.tensor(mine, device=self.device))
            want, allowed = part.dz(torch.tensor(columns, device=self.device), g_3R[:, mine], staged)
            info = torch.finfo(dtype)
            allowed = allowed * scale + info.eps * want.abs() * scale + info.smallest_normal * info.eps
            finding.add("dz", found, want * scale, allowed, [self.rows[n] for n in mine], columns)
        return finding
