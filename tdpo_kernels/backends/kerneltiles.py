"""Make tiles that Triton kernels reduce: by library products, or in the kernels' own registers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Inputs, Part
from . import launch, selfcheck
from .grid import ALIGNED, Grid, cut, padded, size, tile_of
from .launch import Head, Operands
from .logits import Operand, Side, block_of, copied_bytes, sides_of
from .rowmath import STATE
from .walk import Kind

FUSED_TILE = 8192  # rows and columns of a tile of `fused`, of which only dz lies in memory


def runs_on(device: torch.device) -> bool:
    return not launch.unavailable(device)


class RowTiles:
    """Make both models' tiles in memory by library products, and reduce them by one kernel each way."""

    def __init__(self, inputs: Inputs) -> None:
        device = inputs.policy.hidden.device
        self.work, self.labels_T = inputs.work, inputs.rows.labels_T
        self.sides = self.policy, self.reference = sides_of(inputs, self.work)
        self.traits = launch.traits_of(
            [side.head for side in self.sides], [side.model.dtype for side in self.sides], bool(inputs.extras), device,
            all(_is_aligned(x) for side in self.sides for x in (side.hidden, side.weight)),
        )  # fmt: skip
        self.states = STATE + (launch.EXTRAS if inputs.extras else 0)
        self.grid = self._cut(inputs)
        self.check = selfcheck.Check(inputs, self.grid)

    def _cut(self, inputs: Inputs) -> Grid:
        """Return the grid of tiles, which hold both models' fp32 products and dz."""
        tile, per_entry = tile_of(inputs.policy.hidden.device), 2 * 4 + self.policy.operand_dtype.itemsize
        return cut(inputs, tile, (per_entry, *copied_bytes(self.sides)), widest=tile[1])

    def part(self, rows: slice, cols: slice, labels_2R: Tensor, kept: Tensor | None) -> Tensor:
        tiles = [self._products(m, rows, cols, kept, make=True) for m in (0, 1)]
        states = self._states(1, size(rows))
        self.check.seen(
            launch.tile_stats(
                self.traits, tiles, self._heads(cols), self._labels(rows), cols.start, states, labels_2R
            )
        )  # fmt: skip
        return states

    def dz(self, rows: slice, cols: slice, kind: Kind, row_R: Tensor, kept: Tensor | None) -> Tensor:
        needed = kind is not Kind.ONLY_Q or self.policy.head.softcap is not None, kind is not Kind.ONLY_P
        make, out = kept is None, self._dz(rows, cols)
        tiles = [self._products(m, rows, cols, kept, make) if need else None for m, need in enumerate(needed)]
        made = launch.tile_dz(self.traits, tiles, self._heads(cols), self._labels(rows), cols.start, row_R, out)
        return self.check.dz(made, rows, cols, row_R, out)

    def checked(self, inputs: Inputs, part: Part) -> Part:
        return self.check.forward(part)

    def _products(self, m: int, rows: slice, cols: slice, kept: Tensor | None, make: bool) -> Tensor:
        R, C, side = size(rows), size(cols), self.sides[m]
        x = self.work.get(f"tile {m}", torch.float32, R, padded(C))[:, :C] if kept is None else kept[m]
        return side.products(rows, cols, x) if make else x

    def _states(self, parts: int, rows: int) -> Tensor:
        return torch.empty(parts, self.states, rows, dtype=torch.float32, device=self.work.device)

    def _dz(self, rows: slice, cols: slice) -> Tensor:
        return self.work.get("dz", self.policy.operand_dtype, size(rows), padded(size(cols)))[:, : size(cols)]

    def _labels(self, rows: slice) -> Tensor:
        return block_of(self.labels_T, rows)

    def _heads(self, cols: slice) -> list[Head]:
        return [launch.head_of(side.head, side.bias(cols)) for side in self.sides]


class FusedTiles(RowTiles):
    """Make both models' logits in the registers of kernels: only dz and kept tiles reach memory."""

    def _cut(self, inputs: Inputs) -> Grid:
        """Return the grid of tiles, which hold dz. The workspace also holds the states of a row block, and copies of
        matrices whose elements do not lie side by side in a row."""
        per_row, per_col = copied_bytes(self.sides)
        C = self.traits.config("fused_stats").C
        per_row += 4 * self.states * -(-inputs.policy.head.weight.shape[0] // C)
        per_row += sum(_unpacked_bytes(side.hidden) for side in self.sides)
        per_col += sum(_unpacked_bytes(side.weight) for side in self.sides)
        is_cpu = inputs.policy.hidden.device.type == "cpu"
        tile = tile_of(inputs.policy.hidden.device) if is_cpu else (FUSED_TILE, FUSED_TILE)
        held = self.policy.operand_dtype.itemsize, per_row, per_col
        return cut(inputs, tile, held, multiple=max(C, ALIGNED), widest=max(tile[1], C))

    def part(self, rows: slice, cols: slice, labels_2R: Tensor, kept: Tensor | None) -> Tensor:
        states = self._states(-(-size(cols) // self.traits.config("fused_stats").C), size(rows))
        labels_R = self._labels(rows)
        self.check.seen(
            launch.fused_stats(
                self.traits, *self._operands(rows, cols), labels_R, cols.start, states, labels_2R, kept
            )
        )  # fmt: skip
        return states

    def dz(self, rows: slice, cols: slice, kind: Kind, row_R: Tensor, kept: Tensor | None) -> Tensor:
        """Return dz. The kernel sees for itself which products its rows need."""
        if kept is not None:
            return super().dz(rows, cols, kind, row_R, kept)
        out, labels_R = self._dz(rows, cols), self._labels(rows)
        made = launch.fused_dz(self.traits, *self._operands(rows, cols), labels_R, cols.start, row_R, out)
        return self.check.dz(made, rows, cols, row_R, out)

    def _operands(self, rows: slice, cols: slice) -> list[Operands]:
        return [_operands(side, head, rows, cols) for side, head in zip(self.sides, self._heads(cols), strict=True)]


def _operands(side: Side, head: Head, rows: slice, cols: slice) -> Operands:
    dtype = side.model.dtype
    return Operands(_packed(side.hidden.block(rows, dtype)), _packed(side.weight.block(cols, dtype)), head)


def _packed(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _unpacked_bytes(x: Operand) -> int:
    """Return the bytes of a row that is copied because its elements do not lie side by side, else 0."""
    return 0 if x.needs_copy() or x.source.stride(1) == 1 else x.source.shape[1] * x.source.itemsize


def _is_aligned(x: Operand) -> bool:
    copied = x.needs_copy() or x.source.stride(-1) != 1
    return launch.aligned(x.source.new_empty(0, x.source.shape[-1], dtype=x.compute) if copied else x.source)
