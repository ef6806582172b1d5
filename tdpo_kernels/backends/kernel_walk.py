"""Forward and backward where the row mathematics are Triton kernels, whoever makes the tiles.

Forward, row blocks outside: the states of all parts of the vocabulary (`device/stats.py`), merged (`device/merge.py`).
Backward: dz tile by tile (`device/dlogits.py`), then library products (7) (`sums.py`). The first tiles in column order
are staged, as far as the budget goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..types import Forward, Gradients, Inputs, Needs
from . import launch, selfcheck, tile_math
from .dlogits import Coefficients, Kind
from .launch import ROWS, STATE, Launch, Traits, traits_of
from .products import SIXTEEN_BIT
from .slab import Grid, Side, Workspace, blocks, sides_of
from .sums import gradients


@dataclass(frozen=True, eq=False)
class Call:
    """How one call is cut, and what it works with."""

    inputs: Inputs
    grid: Grid
    part: int  # columns of a part of the vocabulary, the last one of a block's may have less
    sides: tuple[Side, Side]
    traits: Traits
    work: Workspace

    def labels(self, rows: slice, cols: slice) -> Tensor:
        """Counted from the first of the columns."""
        return self.inputs.rows.labels_T[rows] - cols.start

    def parts(self, cols: slice) -> slice:
        """The parts that these columns are; blocks begin where a part does."""
        return slice(cols.start // self.part, -(-cols.stop // self.part))


class Maker(Protocol):
    """A way to make tiles of both models' logits, and what becomes of them before they are gone."""

    def cut(self, inputs: Inputs, sides: tuple[Side, Side], traits: Traits) -> tuple[Grid, int]:
        """The grid, and how many columns a part has."""
        ...

    def ranges(self, call: Call, columns: list[slice]) -> list[slice]:
        """Columns that are not staged, as they are to be asked for."""
        ...

    def states(self, call: Call, rows: slice, cols: slice, states: Tensor, planes: Tensor | None) -> Launch:
        """Fills `states` ``(parts, STATE, R)`` of these columns, and `planes` ``(planes, R, C)`` if given."""
        ...

    def dz(
        self, call: Call, rows: slice, cols: slice, kind: Kind, values_R: Tensor, coefficients_R: Tensor, out: Tensor
    ) -> Launch:
        """Eq. (6) for one tile, from recomputed logits."""
        ...


def forward(maker: Maker, inputs: Inputs, needs: Needs) -> Forward:
    call = _call(maker, inputs, None)
    values_T = inputs.keep(ROWS, call.grid.T, dtype=torch.float32)
    stage = _Stage.empty(call) if needs else _Stage.none(call)
    launches: dict[Launch, None] = {}
    for i, rows, _ in blocks(call.grid.row_blocks()):
        launches |= dict.fromkeys(_row_block(maker, call, stage, i, rows, values_T[:, rows]))
    kl, logp, ref_logp, _, entropy, total, is_argmax = values_T[5:].clone().unbind()
    every = dict(entropy=entropy, mean_logit=total / call.grid.V, is_argmax=is_argmax)
    saved, state = (values_T, stage.flat, stage.weights), values_T[:5].unbind()
    out = tile_math.finished(
        inputs, [logp, ref_logp, kl], every, saved if needs else (), state if inputs.partial else ()
    )
    selfcheck.forward(inputs, call.grid, launches, out)
    return out


def _call(maker: Maker, inputs: Inputs, made: tuple[Grid, int] | None) -> Call:
    """`made`: how forward cut it. Backward may find other addresses or settings, that would be cut otherwise."""
    work = Workspace(inputs.policy.hidden.device)
    sides = sides_of(inputs, work)
    traits = traits_of(inputs, sides)
    return Call(inputs, *(made or maker.cut(inputs, sides, traits)), sides, traits, work)


def _row_block(maker: Maker, call: Call, stage: _Stage, i: int, rows: slice, values_R: Tensor) -> list[Launch]:
    """Row values of one block of rows over the whole vocabulary, and what is staged of them."""
    columns, R = call.grid.col_blocks(), rows.stop - rows.start
    every = slice(0, call.grid.V)
    states = torch.empty(call.parts(every).stop, STATE, R, dtype=torch.float32, device=call.work.device)
    planes = [stage.planes(i, k, R, C) for k, _, C in blocks(columns)]
    staged = [cols for cols, tile in zip(columns, planes, strict=True) if tile is not None]
    rest = maker.ranges(call, columns[len(staged) :])
    launches = [
        maker.states(call, rows, cols, states[call.parts(cols)], tile)
        for cols, tile in [*zip(staged, planes, strict=False), *((cols, None) for cols in rest)]
    ]
    weights = stage.weights_of(slice(0, staged[-1].stop), rows) if staged else None
    return [*launches, launch.merge_states(states, values_R, weights, call.traits.extras)]


def backward(
    maker: Maker,
    inputs: Inputs,
    needs: Needs,
    saved: tuple[Tensor | None, ...],
    g_logp_T: Tensor | None,
    g_kl_T: Tensor | None,
    g_label_T: Tensor | None = None,
) -> Gradients:
    values_T, flat, weights = saved
    call = _call(maker, inputs, _Stage.cut(inputs, flat, weights))
    stage, policy = _Stage(call, flat, weights), call.sides[0]
    rows_T = (values_T[:2], values_T[2:4], values_T[6:8], values_T[4], values_T[8])  # as `tiled.ROW_VALUES`
    c = Coefficients(inputs, call.grid, rows_T, g_logp_T, g_kl_T, g_label_T)
    coefficients_3T = torch.stack([c.a, c.b, c.label])
    check = selfcheck.Slabs(inputs, call.grid, (g_logp_T, g_kl_T, g_label_T), c.scale)

    def dz(i: int, rows: slice, k: int, cols: slice) -> Tensor | None:
        if c.kinds[i] is Kind.NOTHING:
            return None
        R, C = rows.stop - rows.start, cols.stop - cols.start
        out = call.work.get("dz", policy.operand_dtype, R, apart(C))[:, :C]
        coefficients_3R = coefficients_3T[:, rows]
        planes = stage.planes(i, k, R, C)
        if planes is None:
            made = maker.dz(call, rows, cols, c.kinds[i], values_T[:, rows], coefficients_3R, out)
        else:
            weights, labels_R = stage.weights_of(cols, rows), call.labels(rows, cols)
            made = launch.staged_dz(call.traits, planes, weights, call.part, labels_R, coefficients_3R, out)
        check.see(made, rows, cols, out)
        return out

    grads = gradients(inputs, call.grid, needs, policy, c.scale, dz)
    check.verdict()
    return grads


@dataclass(frozen=True, eq=False)
class _Stage:
    """What is kept for backward: planes of the first tiles of the grid in column order, and for each of their parts and
    each row `device.math.part_weights`. Their shapes tell how forward cut the logits, though nothing be staged."""

    call: Call
    flat: Tensor  # (slots, planes, R, C)
    weights: Tensor  # (column blocks, parts of each, 3, T)

    @staticmethod
    def none(call: Call) -> _Stage:
        return _Stage(call, torch.empty(0, 0, 0, 0), torch.empty(0, 0, 3, call.grid.T))

    @staticmethod
    def cut(inputs: Inputs, flat: Tensor, weights: Tensor) -> tuple[Grid, int]:
        """Grid, and columns of a part."""
        R, C = flat.shape[2:]
        return Grid(inputs.rows.count, inputs.policy.head.weight.shape[0], R, C), C // weights.shape[1]

    @staticmethod
    def empty(call: Call) -> _Stage:
        """Room for as many tiles as the budget holds, with weights of all rows for each column block begun."""
        inputs, grid, planes = call.inputs, call.grid, _planes(call)
        dtype = torch.bfloat16 if inputs.policy.dtype in SIXTEEN_BIT else torch.float32
        row_count, parts = max(len(grid.row_blocks()), 1), grid.C // call.part
        tile, weights = planes * grid.R * grid.C * dtype.itemsize, 12 * parts * grid.T
        whole, rest = divmod(inputs.memory_budget, row_count * tile + weights)
        slots = min(whole, len(grid.col_blocks())) * row_count
        if whole < len(grid.col_blocks()):
            slots += max(rest - weights, 0) // tile
        flat = inputs.keep(slots, planes, grid.R, grid.C, dtype=dtype)
        return _Stage(call, flat, inputs.keep(-(-slots // row_count), parts, 3, grid.T, dtype=torch.float32))

    def planes(self, i: int, k: int, R: int, C: int) -> Tensor | None:
        """``(planes, R, C)`` of row block i and column block k, or None if they are to be recomputed."""
        slot = k * max(len(self.call.grid.row_blocks()), 1) + i
        if slot >= self.flat.shape[0]:
            return None
        count = self.flat.shape[1]
        return self.flat[slot].view(-1)[: count * R * apart(C)].view(count, R, apart(C))[..., :C]

    def weights_of(self, cols: slice, rows: slice) -> Tensor:
        """``(parts, 3, R)`` of whole column blocks."""
        return self.weights.flatten(0, 1)[self.call.parts(cols), :, rows]


def apart(C: int) -> int:
    """How far apart rows of a tile lie: a multiple of 16, or a vocabulary's last columns would be a kernel's second
    binary, and one that loads them one by one."""
    return -(-C // 16) * 16


def _planes(call: Call) -> int:
    return 2 if call.inputs.policy.head.softcap is None else 3
