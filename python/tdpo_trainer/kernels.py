"""Everything this package takes from `tdpo_kernels`, in one place.

The last two lines are not among its public names yet: the loss from statistics already computed (so that the extras of
the same pass can be logged), and why a backend was chosen (so that a run can say it).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tdpo_kernels import LMHead, TDPOLoss, TDPOOutput, TokenStats, token_stats
from tdpo_kernels.backends import availability, choose
from tdpo_kernels.loss import DEFAULT_ALPHA, preference_loss

__all__ = ["LMHead", "TDPOLoss", "TDPOOutput", "TokenStats", "explain_backend", "loss_of", "on_device", "token_stats"]


def loss_of(stats: TokenStats, beta: float, alpha: float | None, variant: str) -> TDPOOutput:
    """Eqs. (3) to (5) on the ``(2P, L)`` statistics of a batch; the loss is the mean over its pairs."""
    alpha = DEFAULT_ALPHA if alpha is None else alpha
    return preference_loss(stats, beta=beta, alpha=alpha, variant=variant, reduction="mean")


def explain_backend(backend: str, device: torch.device) -> str:
    """``"tiled (asked for: auto; available: ...)"``. Raises ValueError where a named backend does not run."""
    name, _ = choose(backend, device)
    return f"{name} (asked for: {backend}; {availability(device)[name]})"


def on_device(head: LMHead, device: torch.device) -> LMHead:
    return replace(head, weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device))
