"""`tiled` on a GPU: library products make both tiles of logits in cache, and one row kernel each way takes them from
there."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Inputs
from . import launch
from .dlogits import Kind
from .kernel_walk import Call
from .launch import STATE
from .products import logits_
from .slab import Grid, Side, make_grid


def runs_on(device: torch.device) -> bool:
    return not launch.unavailable(device)


class Rowwise:
    def cut(self, inputs: Inputs, sides: tuple[Side, Side]) -> tuple[Grid, int]:
        grid = make_grid(inputs)
        return grid, grid.C

    def ranges(self, call: Call, columns: list[slice]) -> list[slice]:
        return columns

    def states(self, call: Call, rows: slice, cols: slice, planes: Tensor | None) -> Tensor:
        tiles = [_products(side, rows, cols) for side in call.sides]
        states = call.empty(1, STATE, rows.stop - rows.start)
        biases = [launch.bias_block(side, cols) for side in call.sides]
        heads = [side.model.head for side in call.sides]
        extras = bool(call.inputs.extras)
        launch.tile_stats(tiles, heads, biases, call.labels(rows, cols), states, planes, extras)
        return states

    def dz(
        self, call: Call, rows: slice, cols: slice, kind: Kind, values_R: Tensor, coefficients_R: Tensor, out: Tensor
    ) -> None:
        needed = (kind is not Kind.ONLY_Q, kind is not Kind.ONLY_P)
        tiles = [_products(side, rows, cols) if need else None for side, need in zip(call.sides, needed, strict=True)]
        biases = [launch.bias_block(side, cols) for side in call.sides]
        heads = [side.model.head for side in call.sides]
        launch.tile_dz(tiles, heads, biases, call.labels(rows, cols), values_R, coefficients_R, out)


def _products(side: Side, rows: slice, cols: slice) -> Tensor:
    """``h W^T`` of one tile in fp32; the rest of the head is the row kernel's."""
    out = side.work.get(side.name, rows.stop - rows.start, cols.stop - cols.start, torch.float32)
    dtype = side.forward_dtype
    logits_(out, side.hidden.block(rows, dtype), side.weight.block(cols, dtype), side.model.dtype)
    return out
