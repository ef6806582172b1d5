"""The four matrix products that any exact TDPO step makes. Not a full provider: no softmax, no loss, no gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..problem import Problem


class Floor:
    """Whole products in the problem's dtype, into buffers touched beforehand: no page faults in the floor."""

    name = "floor"

    def available(self) -> str | None:
        return None

    def make(self, problem: Problem) -> Callable[[], Tensor]:
        h, w = problem.hidden.detach().flatten(0, 1), problem.weight.detach()
        h_ref, w_ref = problem.ref_hidden.flatten(0, 1), problem.ref_weight
        z, dh, dw = (x.new_zeros(size) for x, size in ((h, (h.shape[0], w.shape[0])), (h, h.shape), (w, w.shape)))
        no_loss = torch.tensor(torch.nan)

        def step() -> Tensor:
            torch.mm(h_ref, w_ref.T, out=z)
            torch.mm(h, w.T, out=z)
            torch.mm(z, w, out=dh)
            torch.mm(z.T, h, out=dw)
            return no_loss

        return step
