"""Make tiles that Triton kernels reduce: by library products, or in the kernels' own registers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Inputs, Part
from . import launch, selfcheck
from .grid import ALIGNED, Grid, cut, padded, size, tile_of
from .launch import Head
from .logits import block_of, copied_bytes, sides_of
from .rowmath import STATE
from .walk import Kind

FUSED_TILE = 16384, 4096  # rows and columns of a tile of `fused`, of which only dz lies in memory
NARROW = 4096  # D + E above which it has half as many columns, so that few rows and many have tiles of one width


class RowTiles:
    """Make both models' tiles in memory by library products, and reduce them by one kernel each way."""

    KERNELS, PACKED = ("tile_stats", "tile_dz"), False

    def __init__(self, inputs: Inputs) -> None:
        device = inputs.policy.hidden.device
        self.work, self.labels_T = inputs.work, inputs.rows.labels_T
        self.sides = self.policy, self.reference = sides_of(inputs, self.work, self.PACKED)
        self.kernels = launch.Kernels(
            [side.head for side in self.sides], [side.model.dtype for side in self.sides], bool(inputs.extras), device,
            all(x.is_aligned for side in self.sides for x in (side.hidden, side.weight)),
        )  # fmt: skip
        self.states = STATE + 2 * bool(inputs.extras)
        self.grid = self._cut(inputs)
        self.kernels.columns = self.grid.C
        self.check = selfcheck.Check(inputs, self.grid, self.kernels)
        self.heads, self.rooms = dict[int, list[Head]](), dict[tuple[str, int, int], Tensor]()

    def _cut(self, inputs: Inputs) -> Grid:
        """Return the grid of tiles, which hold both models' fp32 products and dz."""
        tile, per_entry = tile_of(inputs.policy.hidden.device), 2 * 4 + self.policy.operand_dtype.itemsize
        return cut(inputs, tile, (per_entry, *copied_bytes(self.sides)), widest=tile[1])

    def part(self, rows: slice, cols: slice, labels_2R: Tensor, kept: Tensor | None) -> Tensor:
        tiles, states = [self._products(m, rows, cols, kept) for m in (0, 1)], self._states(rows, cols, self.grid.C)
        self.kernels.stats(tiles, *self._where(rows, cols), states, labels_2R)
        return states

    def dz(self, rows: slice, cols: slice, kind: Kind, row_R: Tensor, kept: Tensor | None) -> Tensor:
        if kept is None:  # what no row needs is not read, and only stands for a tile
            only_r = kind is Kind.ONLY_Q and self.policy.head.softcap is None
            made = {m: self._products(m, rows, cols, None) for m in (0, 1) if not (only_r, kind is Kind.ONLY_P)[m]}
            kept = made.get(0, made.get(1)), made.get(1, made.get(0))
        out = self._room("dz", self.policy.operand_dtype, rows, cols)
        self.kernels.dz(kept, *self._where(rows, cols), row_R, out)
        return self.check.dz("tile_dz", rows, cols, row_R, out)

    def checked(self, part: Part) -> Part:
        return self.check.forward(part)

    def _products(self, m: int, rows: slice, cols: slice, kept: Tensor | None) -> Tensor:
        out = self._room(("z", "r")[m], torch.float32, rows, cols) if kept is None else kept[m]
        return self.sides[m].products(rows, cols, out)

    def _room(self, name: str, dtype: torch.dtype, rows: slice, cols: slice) -> Tensor:
        """Return room for a tile, whose rows begin where those of kept tiles do."""
        R, C = size(rows), size(cols)
        if (name, R, C) not in self.rooms:
            self.rooms[name, R, C] = self.work.get(name, dtype, R, padded(C))[:, :C]
        return self.rooms[name, R, C]

    def _states(self, rows: slice, cols: slice, width: int) -> Tensor:
        return torch.empty(-(-size(cols) // width), self.states, size(rows), device=self.work.device)

    def _where(self, rows: slice, cols: slice) -> tuple[list[Head], Tensor, int]:
        """Return what kernels know of a tile's columns and rows: the heads, the labels, and the first column."""
        if cols.start not in self.heads:
            self.heads[cols.start] = [launch.head_of(side.head, side.bias(cols)) for side in self.sides]
        return self.heads[cols.start], block_of(self.labels_T, rows), cols.start


class FusedTiles(RowTiles):
    """Make both models' logits in the registers of kernels: only dz and kept tiles reach memory."""

    KERNELS, PACKED = ("fused_stats", "fused_dz", "tile_dz"), True

    def _cut(self, inputs: Inputs) -> Grid:
        """Return the grid of tiles, which hold dz. The workspace also holds the states of a row block."""
        per_row, per_col = copied_bytes(self.sides)
        C = self.kernels.config("fused_stats").C
        per_row += 4 * self.states * -(-inputs.policy.head.weight.shape[0] // C)
        R, width = tile_of(self.work.device) if self.work.device.type == "cpu" else FUSED_TILE
        width = max(width // (1 + (sum(side.hidden.source.shape[-1] for side in self.sides) > NARROW)), C)
        held = self.policy.operand_dtype.itemsize, per_row, per_col
        return cut(inputs, (R, width), held, multiple=max(C, ALIGNED), widest=width)

    def part(self, rows: slice, cols: slice, labels_2R: Tensor, kept: Tensor | None) -> Tensor:
        states = self._states(rows, cols, self.kernels.prepare("fused_stats")[1].C)
        self.kernels.stats(self._matrices(rows, cols), *self._where(rows, cols), states, labels_2R, kept)
        return states

    def dz(self, rows: slice, cols: slice, kind: Kind, row_R: Tensor, kept: Tensor | None) -> Tensor:
        """Return dz. The kernel sees for itself which products its rows need."""
        if kept is not None:
            return super().dz(rows, cols, kind, row_R, kept)
        out = self._room("dz", self.policy.operand_dtype, rows, cols)
        self.kernels.dz(self._matrices(rows, cols), *self._where(rows, cols), row_R, out)
        return self.check.dz("fused_dz", rows, cols, row_R, out)

    def _matrices(self, rows: slice, cols: slice) -> list[Tensor]:
        pairs = ((x, side.model.dtype) for side in self.sides for x in ((side.hidden, rows), (side.weight, cols)))
        return [operand.block(block, dtype) for (operand, block), dtype in pairs]
