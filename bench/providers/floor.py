"""Make the matrix products that any exact TDPO step makes: two forward, two backward, one backward with a frozen head.

It is no full provider: no softmax, no loss, no gradient. Each product returns a new tensor, as `torch.mm` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem, Step
from ..shapes import Shape
from .provider import Provider

ROWS = 16384  # at once: more logits than that nobody needs to hold


def make(problem: Problem) -> Step:
    """Multiply the tokens that count, and no others. dz is random: products of zeros run faster on a GPU."""
    hidden, ref_hidden = (problem.packed(x.detach()).split(ROWS) for x in (problem.hidden, problem.ref_hidden))
    weight, ref_weight = problem.weight.detach(), problem.ref_weight
    dz_TV = torch.randn_like(hidden[0].new_empty(len(hidden[0]), len(weight))) if problem.hidden.requires_grad else None

    def forward() -> Tensor | None:
        for h, h_ref in zip(hidden, ref_hidden, strict=True):
            torch.mm(h_ref, ref_weight.T)
            torch.mm(h, weight.T)
        return dz_TV

    def backward(dz_TV: Tensor) -> None:
        for h in hidden:
            dz = dz_TV[: len(h)]
            torch.mm(dz, weight)
            if problem.weight.requires_grad:
                torch.mm(dz.T, h)

    return Step(forward, backward)


def needs(shape: Shape) -> int:
    return 2 * 4 * min(shape.rows, ROWS) * shape.V


PROVIDER = Provider("products", make, needs=needs)
