"""The four matrix products that any exact TDPO step makes. Not a full provider: no softmax, no loss, no gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..problem import Problem


class Floor:
    """Whole products in the problem's dtype, each returning a new tensor, as `torch.mm` does."""

    name = "floor"

    def available(self) -> str | None:
        return None

    def make(self, problem: Problem) -> Callable[[], Tensor]:
        h, w, h_ref, w_ref = operands(problem)
        no_loss = torch.tensor(torch.nan)

        def step() -> Tensor:
            torch.mm(h_ref, w_ref.T)
            z = torch.mm(h, w.T)
            torch.mm(z, w)
            torch.mm(z.T, h)
            return no_loss

        return step


class FloorOut:
    """The same into buffers touched beforehand: no page faults either, which no training step is spared."""

    name = "floor-out"

    def available(self) -> str | None:
        return None

    def make(self, problem: Problem) -> Callable[[], Tensor]:
        h, w, h_ref, w_ref = operands(problem)
        z, dh, dw = (x.new_zeros(size) for x, size in ((h, (h.shape[0], w.shape[0])), (h, h.shape), (w, w.shape)))
        no_loss = torch.tensor(torch.nan)

        def step() -> Tensor:
            torch.mm(h_ref, w_ref.T, out=z)
            torch.mm(h, w.T, out=z)
            torch.mm(z, w, out=dh)
            torch.mm(z.T, h, out=dw)
            return no_loss

        return step


def operands(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, ref_hidden = problem.hidden.detach().flatten(0, 1), problem.ref_hidden.flatten(0, 1)
    return hidden, problem.weight.detach(), ref_hidden, problem.ref_weight
