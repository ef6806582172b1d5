"""Forward and backward where the row mathematics are Triton kernels, whoever makes the tiles.

Forward, row blocks outside: the states of all parts of the vocabulary (`device/stats.py`), merged (`device/merge.py`).
Backward: dz tile by tile (`device/dlogits.py`), then library products (7) (`sums.py`). The first tiles in column order
are staged, as far as the budget goes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..types import Forward, Gradients, Inputs, Needs
from . import launch, tile_math
from .dlogits import Coefficients, Kind
from .launch import ROWS
from .products import SIXTEEN_BIT
from .slab import Grid, Side, Workspace, blocks, sides_of
from .sums import gradients


@dataclass(frozen=True, eq=False)
class Call:
    """How one call is cut, and what it works with."""

    inputs: Inputs
    grid: Grid
    part: int  # columns of a staged part
    sides: tuple[Side, Side]
    work: Workspace

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=self.work.device)

    def labels(self, rows: slice, cols: slice) -> Tensor:
        """Counted from the first of the columns."""
        return self.inputs.rows.labels_T[rows] - cols.start


class Maker(Protocol):
    """A way to make tiles of both models' logits, and what becomes of them before they are gone."""

    def cut(self, inputs: Inputs, sides: tuple[Side, Side]) -> tuple[Grid, int]:
        """The grid, and how many columns a staged part has."""
        ...

    def ranges(self, call: Call, columns: list[slice]) -> list[slice]:
        """Columns that are not staged, as they are to be asked for."""
        ...

    def states(self, call: Call, rows: slice, cols: slice, planes: Tensor | None) -> Tensor:
        """``(parts, STATE, R)`` of one tile; fills `planes` ``(planes, R, C)`` if given."""
        ...

    def dz(
        self, call: Call, rows: slice, cols: slice, kind: Kind, values_R: Tensor, coefficients_R: Tensor, out: Tensor
    ) -> None:
        """Eq. (6) for one tile, from recomputed logits."""
        ...


def forward(maker: Maker, inputs: Inputs, needs: Needs) -> Forward:
    call = _call(maker, inputs)
    values_T = call.empty(ROWS, call.grid.T)
    stage = _Stage.empty(call) if needs else _Stage.none(call)
    for i, rows, _ in blocks(call.grid.row_blocks()):
        _row_block(maker, call, stage, i, rows, values_T[:, rows])
    kl, logp, ref_logp, _, entropy, total, is_argmax = values_T[5:]
    infinite = tile_math.kl_is_infinite(inputs.policy, inputs.reference)
    if infinite is not None:
        kl = kl.masked_fill(infinite, math.inf)
    every = dict(entropy=entropy, mean_logit=total / call.grid.V, is_argmax=is_argmax)
    shown = [logp, ref_logp, kl, *(every[name] for name in inputs.extras)]
    has_bias = any(side.model.head.bias is not None for side in call.sides)
    shown = [tile_math.to_infinity(x) if has_bias else x.clone() for x in shown]
    extras = dict(zip(inputs.extras, shown[3:], strict=True))
    return Forward(*shown[:3], extras, (values_T, stage.flat, stage.weights) if needs else ())


def _call(maker: Maker, inputs: Inputs) -> Call:
    work = Workspace(inputs.policy.hidden.device)
    sides = sides_of(inputs, work)
    return Call(inputs, *maker.cut(inputs, sides), sides, work)


def _row_block(maker: Maker, call: Call, stage: _Stage, i: int, rows: slice, values_R: Tensor) -> None:
    """Row values of one block of rows over the whole vocabulary, and what is staged of them."""
    columns = call.grid.col_blocks()
    states: list[Tensor] = []
    staged_parts = 0
    for k, cols, C in blocks(columns):
        planes = stage.planes(i, k, rows.stop - rows.start, C)
        if planes is None:
            break
        states.append(maker.states(call, rows, cols, planes))
        staged_parts += states[-1].shape[0]
    for cols in maker.ranges(call, columns[len(states) :]):
        states.append(maker.states(call, rows, cols, None))
    every = states[0] if len(states) == 1 else torch.cat(states)
    weights = stage.weights[:staged_parts, :, rows] if staged_parts else None
    launch.merge_states(every, values_R, weights, bool(call.inputs.extras))


def backward(
    maker: Maker,
    inputs: Inputs,
    needs: Needs,
    saved: tuple[Tensor | None, ...],
    g_logp_T: Tensor | None,
    g_kl_T: Tensor | None,
) -> Gradients:
    values_T, flat, weights = saved
    call = _call(maker, inputs)
    stage, policy = _Stage(call, flat, weights), call.sides[0]
    z_top, r_top, lse_z, lse_r, lse_diff, _, logp, ref_logp, label_ratio = values_T[:9]
    rows_T = (lse_z, lse_r, lse_diff, z_top, r_top, label_ratio, logp, ref_logp)
    c = Coefficients(inputs, call.grid, rows_T, g_logp_T, g_kl_T)
    coefficients_3T = torch.stack([c.a, c.b, c.label])

    def dz(i: int, rows: slice, k: int, cols: slice) -> Tensor | None:
        if c.kinds[i] is Kind.NOTHING:
            return None
        R, C = rows.stop - rows.start, cols.stop - cols.start
        out, coefficients_3R = call.work.get("dz", R, C, policy.backward_dtype), coefficients_3T[:, rows]
        planes = stage.planes(i, k, R, C)
        if planes is None:
            maker.dz(call, rows, cols, c.kinds[i], values_T[:, rows], coefficients_3R, out)
        else:
            weights = stage.weights_of(k)[:, :, rows]
            launch.staged_dz(planes, weights, call.part, call.labels(rows, cols), coefficients_3R, out)
        return out

    return gradients(inputs, call.grid, needs, policy, c.scale, dz)


@dataclass(frozen=True, eq=False)
class _Stage:
    """What is kept for backward: planes of the first tiles of the grid in column order, and for each of their parts and
    each row `device.math.part_weights`."""

    call: Call
    flat: Tensor  # (slots, planes * R * C)
    weights: Tensor  # (parts, 3, T)

    @staticmethod
    def none(call: Call) -> _Stage:
        return _Stage(call, call.empty(0, 0), call.empty(0, 3, call.grid.T))

    @staticmethod
    def empty(call: Call) -> _Stage:
        inputs, grid = call.inputs, call.grid
        dtype = torch.bfloat16 if inputs.policy.dtype in SIXTEEN_BIT else torch.float32
        row_count = max(len(grid.row_blocks()), 1)
        slot, parts = _planes(call) * grid.R * grid.C, -(-grid.C // call.part)
        slots = min(
            inputs.memory_budget // (slot * dtype.itemsize + 12 * parts * grid.R), row_count * len(grid.col_blocks())
        )
        flat = torch.empty(slots, slot, dtype=dtype, device=call.work.device)
        return _Stage(call, flat, call.empty(-(-slots // row_count) * parts, 3, grid.T))

    def planes(self, i: int, k: int, R: int, C: int) -> Tensor | None:
        """``(planes, R, C)`` of row block i and column block k, or None if they are to be recomputed."""
        slot = k * max(len(self.call.grid.row_blocks()), 1) + i
        if slot >= self.flat.shape[0]:
            return None
        count = _planes(self.call)
        return self.flat[slot][: count * R * C].view(count, R, C)

    def weights_of(self, k: int) -> Tensor:
        """``(parts, 3, T)`` of column block k."""
        cols, each = self.call.grid.col_blocks()[k], -(-self.call.grid.C // self.call.part)
        return self.weights[k * each : k * each + -(-(cols.stop - cols.start) // self.call.part)]


def _planes(call: Call) -> int:
    return 2 if call.inputs.policy.head.softcap is None else 3
