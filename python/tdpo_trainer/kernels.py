"""Everything this package takes from `tdpo_kernels`, in one place.

What says why a backend was chosen, and which way the loss goes, is not among its public names; a run says both first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tdpo_kernels import LMHead, TDPOLoss, TDPOOutput, TokenStats, fused_tdpo_loss
from tdpo_kernels.backends import availability, choose
from tdpo_kernels.ways import way

__all__ = [
    "LMHead", "TDPOLoss", "TDPOOutput", "TokenStats", "explain_backend", "explain_way", "fused_tdpo_loss", "on_device",
]  # fmt: skip


def explain_backend(backend: str, device: torch.device) -> str:
    """``"tiled (asked for: auto; available: ...)"``. Raises ValueError where a named backend does not run."""
    name, _ = choose(backend, device)
    return f"{name} (asked for: {backend}; {availability(device)[name]})"


def explain_way(tokens: int, pairs: int, *size: Any, **options: Any) -> str:
    """Return which way a loss goes and how many products it costs; `tdpo_kernels.ways.way` has the arguments."""
    said = way(tokens, pairs, *size, **options)
    return f"a batch of {pairs:,} pairs of 2 x {tokens // (2 * pairs):,} tokens: {said}"


def on_device(head: LMHead, device: torch.device) -> LMHead:
    return replace(head, weight=head.weight.to(device), bias=None if head.bias is None else head.bias.to(device))
