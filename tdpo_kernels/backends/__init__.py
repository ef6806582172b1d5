"""Ways to compute the token statistics. `choose` is the only place that decides, and it can say why."""

from __future__ import annotations

import torch

from ..types import Backend
from . import naive, tiled

BACKENDS: dict[str, Backend] = {"tiled": tiled, "naive": naive}


def availability(device: torch.device) -> dict[str, str]:
    """Each backend and whether it can run on `device`: ``"available: ..."`` or the reason why not."""
    return {
        "tiled": f"available: library GEMMs into cache-sized tiles, row mathematics in torch, on {device.type}",
        "naive": f"available: keeps [T, V] logits; a baseline and debugging switch, on {device.type}",
    }


def choose(backend: str, device: torch.device) -> tuple[str, Backend]:
    """``"auto"`` is the leanest backend that runs on `device`; a named one is taken at its word or refused."""
    if backend == "auto":
        return "tiled", tiled
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    return backend, BACKENDS[backend]
