"""The matrix products that any exact TDPO step makes, four of them, three with a frozen head. Not a full provider: no
softmax, no loss, no gradient. Each returns a new tensor, as `torch.mm` does."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem
from ..shapes import Shape
from .provider import Provider, Step, anywhere

ROWS = 16384  # at once: more logits than that nobody needs to hold


def make(problem: Problem) -> Step:
    """Over the tokens that count, and no others."""
    hidden, ref_hidden = (problem.packed(x.detach()) for x in (problem.hidden, problem.ref_hidden))
    weight, ref_weight = problem.weight.detach(), problem.ref_weight
    trainable = problem.weight.requires_grad
    blocks = list(zip(hidden.split(ROWS), ref_hidden.split(ROWS), strict=True))
    z = [torch.zeros(len(h), len(weight), dtype=h.dtype, device=h.device) for h, _ in blocks[:1]]

    def forward() -> list[Tensor]:
        for h, h_ref in blocks:
            torch.mm(h_ref, ref_weight.T)
            torch.mm(h, weight.T)
        return z

    def backward(logits: list[Tensor]) -> None:
        for h, _ in blocks:
            dz = logits[0][: len(h)]
            torch.mm(dz, weight)
            if trainable:
                torch.mm(dz.T, h)

    return Step(forward, backward)


def needs(shape: Shape) -> int:
    return 2 * 4 * min(shape.rows, ROWS) * shape.V


PROVIDER = Provider("products", anywhere, make, needs=needs)
