"""Everything this package takes from `tdpo_kernels`, in one place.

What says why a backend was chosen is not among its public names yet; a run says it first.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tdpo_kernels import LMHead, TDPOLoss, TDPOOutput, TokenStats, fused_tdpo_loss
from tdpo_kernels.backends import availability, choose

__all__ = ["LMHead", "TDPOLoss", "TDPOOutput", "TokenStats", "explain_backend", "fused_tdpo_loss", "on_device"]


def explain_backend(backend: str, device: torch.device) -> str:
    """``"tiled (asked for: auto; available: ...)"``. Raises ValueError where a named backend does not run."""
    name, _ = choose(backend, device)
    return f"{name} (asked for: {backend}; {availability(device)[name]})"


def on_device(head: LMHead, device: torch.device) -> LMHead:
    return replace(head, weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device))
