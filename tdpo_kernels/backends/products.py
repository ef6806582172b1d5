"""Matrix products: what is multiplied in which dtype on which device by whose kernel, and how 16-bit gradients are
summed in fp32."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
CPUINFO = Path("/proc/cpuinfo")
ONEDNN_LEAST = 2**23  # multiplications; a smaller product costs more to hand to oneDNN than it saves


def block_of(x: Tensor, rows: slice) -> Tensor:
    """``x[rows]``, without asking torch where that is all of it."""
    return x if rows.stop - rows.start == x.shape[0] else x[rows]


def operand_dtype(compute: torch.dtype, stats: torch.dtype, device: torch.device) -> torch.dtype:
    """CUDA multiplies 16-bit operands into fp32 tiles; elsewhere a 16-bit product would come back in 16 bits, so
    operands are widened: of logits, and of gradients, where rounding would drown what is left when tiles cancel."""
    return compute if device.type == "cuda" and stats == torch.float32 else stats


def logits_(out_RC: Tensor, hidden_RD: Tensor, weight_CD: Tensor) -> Tensor:
    """``hidden @ weight^T`` into an fp32 (float64) tile, accumulated in its dtype. What oneDNN returns is copied and
    let go at once: kept as the tile, it scatters over the heap, and the resident set grows to several times the tiles.
    """
    if hidden_RD.dtype != out_RC.dtype:
        return torch.mm(hidden_RD, weight_CD.T, out_dtype=out_RC.dtype, out=out_RC)
    if (linear := _onednn(hidden_RD, weight_CD.shape[0])) is not None:
        return out_RC.copy_(linear(hidden_RD, weight_CD))
    return torch.mm(hidden_RD, weight_CD.T, out=out_RC)


def accumulate_(acc: Tensor, a: Tensor, b: Tensor, alpha: float, keep: int = 1) -> None:
    """``acc = keep * acc + alpha * a @ b`` in the dtype of acc, keep 0 or 1, alpha a power of two. With keep 0 acc may
    hold anything."""
    if a.dtype != acc.dtype:
        part = torch.mm(a, b, out_dtype=acc.dtype)
    elif (linear := _onednn(a, b.shape[1])) is not None:
        part = linear(a, b.T)
    else:
        acc.addmm_(a, b, alpha=alpha, beta=keep)
        return
    if keep == 0:
        torch.mul(part, alpha, out=acc)
    else:
        acc.add_(part, alpha=alpha)


def _onednn(a: Tensor, cols: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    """oneDNN's ``a @ b^T`` of so many columns, in a new tensor, where it can take `a` and beats `torch.mm`. It heeds
    the user's ``torch.backends.mkldnn`` switches, as `torch.mm` does."""
    if a.dtype != torch.float32 or a.device.type != "cpu" or a.numel() * cols < ONEDNN_LEAST or not mkl_is_held_back():
        return None
    return onednn_linear() if torch.backends.mkldnn.enabled else None


@functools.cache
def mkl_is_held_back() -> bool:
    """Whether `torch.mm` is MKL's on an AVX-512 CPU not made by Intel: there MKL keeps to AVX2, at half the speed."""
    if not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return "GenuineIntel" not in (CPUINFO.read_text() if CPUINFO.exists() else platform.processor())


@functools.cache
def onednn_linear() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Private to torch, there in 2.11 to 2.13; None where it is gone."""
    op = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
    return None if op is None else lambda a, b: op.default(a, b, None, "none", [], "")


class GradientSum:
    """Sums products into blocks of rows of `grad`, in `dtype`, so a 16-bit gradient is rounded once.

    A gradient already in that dtype is its own accumulator. Otherwise `held` rows of accumulator are kept: all of
    them where blocks are returned to, one block where each is finished (`close`) before the next is begun. With
    `index`, row i of what is summed belongs to row ``index[i]`` of the gradient, whose other rows stay as they are;
    without, it may hold anything.
    """

    def __init__(self, grad: Tensor, index: Tensor | None, dtype: torch.dtype, held: int) -> None:
        self.grad, self.index, self.held = grad, index, held
        self.acc = None if grad.dtype == dtype else grad.new_empty(held, grad.shape[1], dtype=dtype)
        self.begun: set[int] = set()

    def add(self, block: slice, a: Tensor, b: Tensor, alpha: float) -> None:
        keep = 1 if block.start in self.begun else 0
        self.begun.add(block.start)
        if self.acc is not None:
            accumulate_(self.acc[self._within(block)], a, b, alpha, keep)
        elif self.index is None:
            accumulate_(block_of(self.grad, block), a, b, alpha, keep)
        else:
            partial = self.grad.new_empty(a.shape[0], b.shape[1])
            accumulate_(partial, a, b, alpha, 0)
            self.grad.index_add_(0, self.index[block], partial)

    def put(self, block: slice, done: Tensor) -> None:
        """All of `block` at once, rounded already."""
        if self.index is None:
            self.grad[block].copy_(done)
        else:
            self.grad.index_copy_(0, self.index[block], done)

    def close(self, block: slice) -> None:
        """`block` is complete: round it into the gradient, or zero it where nothing was added."""
        if block.start not in self.begun:
            if self.index is None:
                self.grad[block].zero_()
        elif self.acc is not None and self.index is None:
            self.grad[block].copy_(self.acc[self._within(block)])
        elif self.acc is not None:
            done = self.acc[self._within(block)].to(self.grad.dtype)
            self.grad.index_copy_(0, self.index[block], done)

    def _within(self, block: slice) -> slice:
        return block if block.stop <= self.held else slice(0, block.stop - block.start)
