"""Define a provider, and the half of TDPO that all of them share: eqs. (3) to (5), on one number per sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import ALPHA, BETA, Problem, Step
from ..shapes import Shape


@dataclass(frozen=True)
class Provider:
    """`computes`: "tdpo2", all of it; "dpo", log-probabilities only, which is less; "products", no loss at all.

    make: makes one step of a problem. What happens here is not timed.
    unavailable: returns why it cannot run this shape there; empty if it can.
    kl: returns the KL of each sequence, ``(S,)``, differentiable.
    needs: returns about how many bytes a step takes above its inputs, where asking first is wise.
    like: the provider whose answer at the whole shape is the gate's truth, where a cut would be compiled once more.
    """

    computes: str
    make: Callable[[Problem], Step]
    unavailable: Callable[[Shape, torch.device], str] = lambda shape, device: ""
    kl: Callable[[Problem], Tensor] | None = None
    needs: Callable[[Shape], int] = lambda shape: 0
    budget: int | None = None
    like: Provider | None = None

    @property
    def partial(self) -> bool:
        return self.computes != "tdpo2"


def preference(margin_S: Tensor, kl_S: Tensor | None) -> Tensor:
    """Return TDPO2's loss; without a KL, DPO's."""
    m_w, m_l = margin_S.chunk(2)
    if kl_S is None:
        return -F.logsigmoid(BETA * (m_w - m_l)).mean()
    k_w, k_l = kl_S.chunk(2)
    return -F.logsigmoid(BETA * (m_w - m_l - ALPHA * (k_l - k_w.detach()))).mean()


def per_sequence(x_T: Tensor, problem: Problem) -> Tensor:
    """Sum packed rows to ``(S,)``."""
    return x_T.view(len(problem.labels), -1).sum(-1)
