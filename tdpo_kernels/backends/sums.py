"""The backward's walk over tiles of dz, and the gradients (7) under construction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..types import Gradients, Inputs, Needs
from .products import GradientSum
from .slab import Grid, Side, blocks, has_slab

MakeDz = Callable[[int, slice, int, slice], Tensor | None]


def gradients(
    inputs: Inputs, grid: Grid, needs: Needs, policy: Side, scale: float, dz: MakeDz, spare: int = 0
) -> Gradients:
    """Sums up (7) from ``dz(i, rows, k, cols)``, which gives the tile of row block i and column block k, times `scale`,
    or None where it is zero.

    The columns go outside, unless dW is not wanted or its fp32 sum would be the larger of the two.

    Args:
        spare: bytes of the memory budget in which nothing is staged.
    """
    columns_outer = needs.weight and grid.T <= grid.V
    if columns_outer and has_slab(inputs):
        sums = SlabSums(inputs, grid, needs, policy, spare)
    else:
        sums = Sums(inputs, grid, needs, policy, 1.0 / scale, columns_outer)
    every_row, every_col = list(blocks(grid.row_blocks())), list(blocks(grid.col_blocks()))
    for outer in every_col if columns_outer else every_row:
        for inner in every_row if columns_outer else every_col:
            (i, rows, _), (k, cols, _) = (inner, outer) if columns_outer else (outer, inner)
            tile = dz(i, rows, k, cols)
            if tile is None:
                sums.skip(rows, cols)
            else:
                sums.add(tile, rows, cols)
        sums.close(outer[1])
    return sums.finish()


def _hidden_sum(inputs: Inputs, held: int) -> GradientSum:
    """dh; of a part of a vocabulary that of the T rows alone, and not rounded."""
    hidden, index, dtype = inputs.policy.hidden, inputs.rows.hidden_T, inputs.stats_dtype
    if inputs.partial:
        return GradientSum(hidden.new_empty(inputs.rows.count, hidden.shape[1], dtype=dtype), None, dtype, held)
    return GradientSum((torch.empty_like if index is None else torch.zeros_like)(hidden), index, dtype, held)


class Sums:
    """The gradient that the outer loop finishes block by block, and the one that the inner loop returns to."""

    def __init__(
        self, inputs: Inputs, grid: Grid, needs: Needs, policy: Side, alpha: float, columns_outer: bool
    ) -> None:
        self.policy, self.alpha, self.columns_outer, dtype = policy, alpha, columns_outer, inputs.stats_dtype
        hidden, head = inputs.policy.hidden, inputs.policy.head
        held_rows, held_cols = (grid.T, grid.C) if columns_outer else (grid.R, grid.V)
        self.bias_sum = hidden.new_zeros(grid.V, dtype=dtype) if needs.bias else None
        self.bias_dtype = head.weight.dtype
        self.hidden = _hidden_sum(inputs, held_rows) if needs.hidden else None
        self.weight = GradientSum(torch.empty_like(head.weight), None, dtype, held_cols) if needs.weight else None
        self.row_blocks, self.col_blocks = grid.row_blocks(), grid.col_blocks()

    def add(self, dz_RC: Tensor, rows: slice, cols: slice) -> None:
        if self.bias_sum is not None:
            self.bias_sum[cols].add_(dz_RC.sum(0, dtype=self.bias_sum.dtype), alpha=self.alpha)
        policy, dtype = self.policy, self.policy.operand_dtype
        dz_RC = policy.gradient_operand(dz_RC)
        if self.hidden is not None:
            self.hidden.add(rows, dz_RC, policy.weight.block(cols, dtype), self.alpha)
        if self.weight is not None:
            self.weight.add(cols, dz_RC.T, policy.hidden.block(rows, dtype), self.alpha)

    def skip(self, rows: slice, cols: slice) -> None:
        """dz is zero there."""

    def close(self, block: slice) -> None:
        outer = self.weight if self.columns_outer else self.hidden
        if outer is not None:
            outer.close(block)

    def finish(self) -> Gradients:
        inner, every = (self.hidden, self.row_blocks) if self.columns_outer else (self.weight, self.col_blocks)
        for block in every if inner is not None else ():
            inner.close(block)
        bias = None if self.bias_sum is None else self.bias_sum.to(self.bias_dtype)
        return Gradients(*(None if x is None else x.grad for x in (self.hidden, self.weight)), bias)


class SlabSums:
    """The same where products come back in 16 bits. With dz of all rows in a slab, dW is one product a column block,
    which rounds it once. Where the budget has room for dz of the whole vocabulary so is dh; else it is summed up in
    fp32."""

    def __init__(self, inputs: Inputs, grid: Grid, needs: Needs, policy: Side, spare: int) -> None:
        hidden, self.weight, index = inputs.policy.hidden, inputs.policy.head.weight, inputs.rows.hidden_T
        self.grid, self.policy, self.index = grid, policy, index
        self.whole = needs.hidden and not inputs.partial and hidden.element_size() * grid.T * grid.V <= spare
        self.slab = policy.work.get("slab", hidden.dtype, grid.T, grid.V if self.whole else grid.C)
        self.hidden_TD = hidden if index is None else hidden.index_select(0, index)
        self.bias_sum = hidden.new_zeros(grid.V, dtype=inputs.stats_dtype) if needs.bias else None
        self.dw = torch.empty_like(self.weight)
        self.dh = _hidden_sum(inputs, grid.T) if needs.hidden else None

    def add(self, dz_RC: Tensor, rows: slice, cols: slice) -> None:
        if self.bias_sum is not None:
            self.bias_sum[cols].add_(dz_RC.sum(0))
        rounded = self._of(rows, cols).copy_(dz_RC)
        if self.dh is not None and not self.whole:
            dtype = self.policy.operand_dtype
            self.dh.add(rows, dz_RC.copy_(rounded), self.policy.weight.block(cols, dtype), 1.0)

    def skip(self, rows: slice, cols: slice) -> None:
        self._of(rows, cols).zero_()

    def close(self, cols: slice) -> None:
        torch.mm(self._of(slice(None), cols).T, self.hidden_TD, out=self.dw[cols])

    def finish(self) -> Gradients:
        for rows in self.grid.row_blocks() if self.dh is not None else ():
            if self.whole:
                self.dh.put(rows, torch.mm(self.slab[rows], self.weight))
            else:
                self.dh.close(rows)
        bias = None if self.bias_sum is None else self.bias_sum.to(self.weight.dtype)
        return Gradients(None if self.dh is None else self.dh.grad, self.dw, bias)

    def _of(self, rows: slice, cols: slice) -> Tensor:
        return self.slab[rows, cols if self.whole else slice(cols.stop - cols.start)]
