"""`tiled` on a GPU: library products make both tiles of logits in cache, and one row kernel each way takes them from
there."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Inputs, LMHead
from . import launch
from .dlogits import Kind
from .kernel_walk import Call, apart
from .launch import Launch, Traits
from .slab import Grid, Side, make_grid


def runs_on(device: torch.device) -> bool:
    return not launch.unavailable(device)


class Rowwise:
    def cut(self, inputs: Inputs, sides: tuple[Side, Side], traits: Traits) -> tuple[Grid, int]:
        grid = make_grid(inputs)
        return grid, grid.C

    def ranges(self, call: Call, columns: list[slice]) -> list[slice]:
        return columns

    def states(self, call: Call, rows: slice, cols: slice, states: Tensor, planes: Tensor | None) -> Launch:
        tiles = [_tile(side, rows, cols) for side in call.sides]
        return launch.tile_stats(call.traits, tiles, *_heads(call, cols), call.labels(rows, cols), states, planes)

    def dz(
        self, call: Call, rows: slice, cols: slice, kind: Kind, values_R: Tensor, coefficients_R: Tensor, out: Tensor
    ) -> Launch:
        needed = (kind is not Kind.ONLY_Q, kind is not Kind.ONLY_P)
        tiles = [_tile(side, rows, cols) if need else None for side, need in zip(call.sides, needed, strict=True)]
        labels_R = call.labels(rows, cols)
        return launch.tile_dz(call.traits, tiles, *_heads(call, cols), labels_R, values_R, coefficients_R, out)


def _tile(side: Side, rows: slice, cols: slice) -> Tensor:
    """One model's products, the caller's until the next ones."""
    R, C = rows.stop - rows.start, cols.stop - cols.start
    return side.products(rows, cols, side.work.get(side.name, side.stats, R, apart(C))[:, :C])


def _heads(call: Call, cols: slice) -> tuple[list[LMHead], list[Tensor | None]]:
    return [side.model.head for side in call.sides], [launch.bias_block(side, cols) for side in call.sides]
