"""Make the products of one model's logits and of its gradients (7), and sum 16-bit gradients in fp32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import torch
from torch import Tensor

from ..types import SUMMANDS, Gradients, Inputs, LMHead, Model, Needs, Workspace
from . import onednn
from .grid import Grid, size, tiles
from .rowmath import LOWEST, is_lowest

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def block_of(x: Tensor, rows: slice) -> Tensor:
    """Return ``x[rows]``, without asking torch where that is all of it."""
    return x if size(rows) == x.shape[0] else x[rows]


@cache
def mixed(device: torch.device, dtype: torch.dtype) -> str:
    """Return the call that multiplies 16 bits into fp32 on `device`: "addmm", which adds up too, "mm", or "" for none.

    Whether torch has them depends on its version and on the device, so each is tried once.
    """
    x, total = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    for call, operands in ((torch.addmm, (total, x, x)), (torch.mm, (x, x))):
        try:
            call(*operands, out_dtype=total.dtype, out=total)
        except (RuntimeError, TypeError):
            continue
        return call.__name__
    return ""


def operand_dtype(compute: torch.dtype, stats: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that operands are multiplied in: widened, unless the device multiplies them into fp32."""
    as_is = compute in SIXTEEN_BIT and stats == torch.float32 and device.type != "cpu" and mixed(device, compute)
    return compute if as_is else stats


def multiply_(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, add: bool = False) -> Tensor:
    """Set ``out = alpha a b``, or ``out + alpha a b``, accumulated in the dtype of out; alpha is a power of two."""
    if a.dtype != out.dtype:
        if mixed(a.device, a.dtype) == "addmm":
            return torch.addmm(out, a, b, out_dtype=out.dtype, beta=int(add), alpha=alpha, out=out)
        part = torch.mm(a, b, out_dtype=out.dtype)
    elif onednn.takes(a, b):
        part = onednn.product(a, b)
    else:
        return out.addmm_(a, b, alpha=alpha, beta=int(add))
    return out.add_(part, alpha=alpha) if add else torch.mul(part, alpha, out=out)


class Operand:
    """Hand out blocks of rows of a matrix: gathered, rounded to the compute dtype, widened to a product's dtype, and
    where `packed` with the elements of a row side by side.

    Hidden states of more than two axes are viewed as a matrix. Where no view is one, rows are gathered by all axes, so
    that the whole is never copied.
    """

    def __init__(
        self, work: Workspace, name: str, source: Tensor, index: Tensor | None, compute: torch.dtype,
        packed: bool = False,
    ) -> None:  # fmt: skip
        self.work, self.name, self.index, self.compute, self.packed = work, name, index, compute, packed
        self.axes, self.source = source.shape[:-1], _matrix(source)
        self.is_gathered = index is not None or self.source.dim() > 2
        self.is_spread = packed and self.source.stride(-1) != 1
        self.loaded: dict[torch.dtype, tuple[slice, Tensor]] = {}

    @property
    def is_aligned(self) -> bool:
        """Return whether TMA takes blocks: base and row stride are multiples of 16 bytes, and rows lie apart."""
        x, apart = self.source, self.source.stride(0)
        if self.is_gathered or x.dtype != self.compute or self.is_spread:  # a copy
            return x.shape[-1] * self.compute.itemsize % 16 == 0
        return x.stride(1) == 1 and apart >= x.shape[1] and (x.data_ptr() | apart * x.itemsize) % 16 == 0

    def copied_bytes(self, dtype: torch.dtype) -> int:
        """Return how many bytes of copies a row of a block takes: gathered or packed, rounded, widened to `dtype`."""
        steps = [step for step in dict.fromkeys((self.compute, dtype)) if {step, self.compute} != {self.source.dtype}]
        first = self.source.itemsize if self.is_gathered or self.is_spread else 0
        return self.source.shape[-1] * (first + sum(step.itemsize for step in steps))

    def block(self, rows: slice, dtype: torch.dtype) -> Tensor:
        have = self.loaded.get(dtype)
        if have is None or have[0] != rows:
            have = self.loaded[dtype] = (rows, self._load(rows, dtype))
        return have[1]

    def _load(self, rows: slice, dtype: torch.dtype) -> Tensor:
        x = self._gathered(rows) if self.is_gathered else block_of(self.source, rows)
        x = _rounded(x, self.compute, dtype, self.work, self.name)
        apart = self.packed and x.stride(1) != 1
        return self.work.get(f"{self.name} packed", x.dtype, *x.shape).copy_(x) if apart else x

    def _gathered(self, rows: slice) -> Tensor:
        index_R = None if self.index is None else self.index[rows]
        if self.source.dim() == 2:
            out = self.work.get(f"{self.name} gathered", self.source.dtype, size(rows), self.source.shape[1])
            return torch.index_select(self.source, 0, index_R, out=out)
        if index_R is None:
            index_R = torch.arange(rows.start, rows.stop, device=self.source.device)
        return self.source[torch.unravel_index(index_R, self.axes)]


def _rounded(x: Tensor, compute: torch.dtype, dtype: torch.dtype, work: Workspace, name: str) -> Tensor:
    """Return x rounded to `compute`, then widened to `dtype`."""
    for step in dict.fromkeys((compute, dtype)):
        if x.dtype != step:
            x = work.get(f"{name} {step}", step, *x.shape).copy_(x)
    return x


def _matrix(x: Tensor) -> Tensor:
    if x.dim() == 2:
        return x
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:  # not a matrix in memory
        return x


class Side:
    """Hand out tiles of one model's logits, and the operands of its gradient products."""

    def __init__(self, model: Model, inputs: Inputs, work: Workspace, name: str, packed: bool) -> None:
        self.model, self.head, self.work, self.stats = model, model.head, work, inputs.stats_dtype
        index = inputs.rows.hidden_T
        self.hidden = Operand(work, f"{name} hidden", model.hidden, index, model.dtype, packed)
        self.weight = Operand(work, f"{name} weight", model.head.weight, None, model.dtype, packed)
        self.operand_dtype = operand_dtype(model.dtype, self.stats, model.hidden.device)

    def products(self, rows: slice, cols: slice, out: Tensor) -> Tensor:
        """Return ``h W^T`` of one tile in `out`, in the statistics' dtype."""
        dtype = self.operand_dtype
        return multiply_(out, self.hidden.block(rows, dtype), self.weight.block(cols, dtype).T)

    def bias(self, cols: slice) -> Tensor | None:
        return None if self.head.bias is None else self.head.bias[cols].to(self.model.dtype)

    def gradient_operand(self, dz_RC: Tensor) -> Tensor:
        """Return dz rounded to the compute dtype, on every device alike, in the dtype its products are taken in."""
        rounded = self.model.dtype if self.model.dtype in SIXTEEN_BIT else dz_RC.dtype
        return _rounded(dz_RC, rounded, self.operand_dtype, self.work, "dz")


def sides_of(inputs: Inputs, work: Workspace, packed: bool = False) -> tuple[Side, Side]:
    return Side(inputs.policy, inputs, work, "z", packed), Side(inputs.reference, inputs, work, "r", packed)


def copied_bytes(sides: tuple[Side, Side]) -> tuple[int, int]:
    """Return how many bytes of copied operands and partial gradients each row and each column of a tile takes."""
    per_row = sum(side.hidden.copied_bytes(side.operand_dtype) for side in sides)
    per_col = sum(side.weight.copied_bytes(side.operand_dtype) for side in sides)
    partial = sides[0].hidden.source.shape[-1] * sides[0].stats.itemsize
    return per_row + 2 * partial, per_col + partial


def affine_(x: Tensor, head: LMHead, bias: Tensor | None) -> Tensor:
    """Add the bias and multiply by the scale. A column whose bias rules it out becomes LOWEST."""
    if bias is not None:
        x.add_(bias)
    if head.logit_scale != 1.0:
        x.mul_(head.logit_scale)
    return x if bias is None else x.masked_fill_(is_lowest(bias), LOWEST)


def capped(x: Tensor, head: LMHead, bias: Tensor | None, out: Tensor) -> Tensor:
    """Return the softcapped logits of x in `out`. Columns that a bias rules out stay LOWEST."""
    torch.mul(x, 1.0 / head.softcap, out=out).tanh_().mul_(head.softcap)
    return out if bias is None else out.masked_fill_(is_lowest(bias), LOWEST)


def ruled_out(policy: Model, reference: Model) -> Tensor | None:
    """Return two bools, ``(2,)``, or None where no head has a bias: whether the policy rules out a token that the
    reference allows, and whether it rules out any."""
    biases = [None if m.head.bias is None else m.head.bias.to(m.dtype) for m in (policy, reference)]
    if all(bias is None for bias in biases):
        return None
    zero = torch.zeros_like(next(bias for bias in biases if bias is not None))
    out, ref_out = (is_lowest(zero if bias is None else bias) for bias in biases)
    return torch.stack([(out & ~ref_out).any(), out.any()])


class Sum:
    """Sum products into blocks of rows of `grad`, so that a 16-bit gradient is rounded once.

    A gradient in the statistics' dtype is its own accumulator. Otherwise there is one of `held` rows: of one block
    where each is finished (`close`) before the next is begun, else of all. With `index`, row i of what is summed
    belongs to row ``index[i]`` of the gradient, whose other rows stay zero. Blocks in `begun` are added to from the
    first product on.
    """

    def __init__(
        self, grad: Tensor, index: Tensor | None, dtype: torch.dtype, held: int, begun: Iterable[int] = ()
    ) -> None:
        self.grad, self.index, self.held = grad, index, held
        self.acc = None if grad.dtype == dtype else grad.new_empty(held, grad.shape[1], dtype=dtype)
        self.begun = set(begun)

    def add(self, block: slice, a: Tensor, b: Tensor, alpha: float) -> None:
        again = block.start in self.begun
        self.begun.add(block.start)
        if self.acc is None and self.index is not None:
            partial = self.grad.new_empty(a.shape[0], b.shape[1])
            self.grad.index_add_(0, self.index[block], multiply_(partial, a, b, alpha))
        else:
            out = block_of(self.grad, block) if self.acc is None else self.acc[self._within(block)]
            multiply_(out, a, b, alpha, again)

    def close(self, block: slice) -> None:
        """Round a complete block into the gradient, or zero it where nothing was added."""
        if block.start not in self.begun:
            if self.index is None:
                self.grad[block].zero_()
        elif self.acc is not None and self.index is None:
            self.grad[block].copy_(self.acc[self._within(block)])
        elif self.acc is not None:
            self.grad.index_copy_(0, self.index[block], self.acc[self._within(block)].to(self.grad.dtype))

    def _within(self, block: slice) -> slice:
        return block if block.stop <= self.held else slice(0, size(block))


class Sums:
    """Build dh, dW and db, in the order of tiles in which the larger fp32 sum is never held whole."""

    def __init__(
        self, inputs: Inputs, grid: Grid, needs: Needs, policy: Side, scale: float, total: Gradients | None
    ) -> None:
        hidden, head, dtype = inputs.policy.hidden, inputs.policy.head, inputs.stats_dtype
        self.grid, self.policy, self.alpha = grid, policy, 1.0 / scale
        self.columns_outer = needs.weight and 0 < grid.T <= grid.V
        held_rows, held_cols = (grid.T, grid.C) if self.columns_outer else (grid.R, grid.V)
        index = inputs.rows.hidden_T if total is None else None
        shape, kept_as = (hidden.shape[:-1].numel(), hidden.dtype) if total is None else (grid.T, dtype)
        make = hidden.new_empty if index is None else hidden.new_zeros
        dh = make(shape, hidden.shape[-1], dtype=kept_as) if needs.hidden else None
        self.hidden = None if dh is None else Sum(dh, index, dtype, held_rows)
        self.weight, self.bias, self.total = None, None, SUMMANDS if total is None else total
        if self.total.weight is not None:
            begun = (cols.start for cols in grid.col_blocks())
            self.weight = Sum(self.total.weight, None, dtype, grid.V, begun)
        elif needs.weight:
            self.weight = Sum(torch.empty_like(head.weight), None, dtype, held_cols)
        if needs.bias:
            self.bias = hidden.new_zeros(grid.V, dtype=dtype) if self.total.bias is None else self.total.bias

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        return tiles(self.grid, self.columns_outer)

    def add(self, dz_RC: Tensor, rows: slice, cols: slice) -> None:
        if self.bias is not None:
            self.bias[cols].add_(dz_RC.sum(0, dtype=self.bias.dtype), alpha=self.alpha)
        dtype, dz_RC = self.policy.operand_dtype, self.policy.gradient_operand(dz_RC)
        if self.hidden is not None:
            self.hidden.add(rows, dz_RC, self.policy.weight.block(cols, dtype), self.alpha)
        if self.weight is not None:
            self.weight.add(cols, dz_RC.T, self.policy.hidden.block(rows, dtype), self.alpha)

    def close(self, rows: slice, cols: slice) -> None:
        """Finish the block that the outer loop leaves behind this tile, if this is its last."""
        if self.columns_outer and self.weight is not None and rows.stop == self.grid.T:
            self.weight.close(cols)
        if not self.columns_outer and self.hidden is not None and cols.stop == self.grid.V:
            self.hidden.close(rows)

    def finish(self) -> Gradients:
        inner, every = self.weight, self.grid.col_blocks()
        if self.columns_outer:
            inner, every = self.hidden, self.grid.row_blocks()
        for block in every if inner is not None else ():
            inner.close(block)
        bias = self.bias
        if bias is not None and self.total.bias is None:
            bias = bias.to(self.policy.head.weight.dtype)
        return Gradients(*(None if x is None else x.grad for x in (self.hidden, self.weight)), bias)
