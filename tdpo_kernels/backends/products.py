"""Matrix products: what is multiplied in which dtype on which device, and how 16-bit gradients are summed in fp32."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def forward_operand_dtype(compute: torch.dtype, stats: torch.dtype, device: torch.device) -> torch.dtype:
    """CUDA multiplies 16-bit operands into fp32 tiles; elsewhere a 16-bit product would come back in 16 bits, so
    operands are widened."""
    return compute if device.type == "cuda" and stats == torch.float32 else stats


def backward_operand_dtype(compute: torch.dtype, stats: torch.dtype, device: torch.device) -> torch.dtype:
    """dz and what it multiplies stay in 16 bits, except for fp16 off CUDA, whose products would overflow and crawl."""
    if compute in SIXTEEN_BIT and stats == torch.float32 and (device.type == "cuda" or compute == torch.bfloat16):
        return compute
    return stats


def logits_(out_RC: Tensor, hidden_RD: Tensor, weight_CD: Tensor, compute: torch.dtype) -> None:
    """``hidden @ weight^T`` into an fp32 (float64) tile, accumulated in its dtype. Operands are exact in `compute`."""
    if hidden_RD.dtype != out_RC.dtype:
        torch.mm(hidden_RD, weight_CD.T, out_dtype=out_RC.dtype, out=out_RC)
    elif compute == torch.bfloat16 and out_RC.dtype == torch.float32 and out_RC.device.type == "cpu":
        with _exact_bf16_products():
            torch.mm(hidden_RD, weight_CD.T, out=out_RC)
    else:
        torch.mm(hidden_RD, weight_CD.T, out=out_RC)


def accumulate_(acc: Tensor, a: Tensor, b: Tensor, alpha: float, keep: int = 1) -> None:
    """``acc = keep * acc + alpha * a @ b``, keep 0 or 1, alpha a power of two. With keep 0 acc may hold anything.

    bf16 products on a CPU come back rounded to bf16, once per tile.
    """
    if a.dtype == acc.dtype:
        acc.addmm_(a, b, alpha=alpha, beta=keep)
        return
    part = torch.mm(a, b, out_dtype=acc.dtype) if a.device.type == "cuda" else torch.mm(a, b)
    if keep == 0:
        torch.mul(part, alpha, out=acc)
    else:
        acc.add_(part, alpha=alpha)


class GradientSum:
    """Sums products into blocks of rows of a gradient like `like`, in `dtype`, so a 16-bit gradient is rounded once.

    A gradient already in that dtype is its own accumulator. Otherwise `held` rows of accumulator are kept: all of
    them where blocks are returned to, one block where each is finished (`close`) before the next is begun. With
    `index`, row i of what is summed belongs to row ``index[i]`` of the gradient, and the other rows are zero.
    """

    def __init__(self, like: Tensor, index: Tensor | None, dtype: torch.dtype, held: int) -> None:
        self.index, self.held = index, held
        self.grad = torch.empty_like(like) if index is None else torch.zeros_like(like)
        self.acc = None if like.dtype == dtype else like.new_empty(held, like.shape[1], dtype=dtype)
        self.begun: set[int] = set()

    def add(self, block: slice, a: Tensor, b: Tensor, alpha: float) -> None:
        keep = 1 if block.start in self.begun else 0
        self.begun.add(block.start)
        if self.acc is not None:
            accumulate_(self.acc[self._within(block)], a, b, alpha, keep)
        elif self.index is None:
            accumulate_(self.grad[block], a, b, alpha, keep)
        else:
            partial = self.grad.new_empty(a.shape[0], b.shape[1])
            accumulate_(partial, a, b, alpha, 0)
            self.grad.index_add_(0, self.index[block], partial)

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


@contextlib.contextmanager
def _exact_bf16_products():
    """Lets oneDNN take an fp32 product of bf16-valued operands on the bf16 units: exact products, fp32 sums, several
    times faster. The switch is process-wide, so it is held only around the product."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
