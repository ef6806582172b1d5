"""Ways to compute the token statistics. `choose` is the only place that decides, and it can say why."""

from __future__ import annotations

import torch

from ..checks import check_backend
from ..tuning import winner
from ..types import Backend, Model
from . import fused, launch, naive, rowwise, tiled

BACKENDS: dict[str, Backend] = {"fused": fused, "tiled": tiled, "naive": naive}


def availability(device: torch.device) -> dict[str, str]:
    """Each backend and whether it can run on `device`: ``"available: ..."`` or the reason why not."""
    missing, rows = launch.unavailable(device), "Triton row kernels" if rowwise.runs_on(device) else "row mathematics"
    fused_says = f"available: Triton kernels that make logits in registers, on {device.type}"
    return {
        "fused": fused_says if not missing else f"unavailable: {missing}",
        "tiled": f"available: library GEMMs into cache-sized tiles, {rows}, on {device.type}",
        "naive": f"available: keeps [T, V] logits; a baseline and debugging switch, on {device.type}",
    }


def choose(backend: str, device: torch.device, policy: Model | None = None) -> tuple[str, Backend]:
    """``"auto"`` is the one measured to be the fastest on such a device and at such sizes; `fused` on a GPU where
    nothing was measured, guarded by its self-check; else `tiled`. A named one is taken at its word or refused."""
    check_backend(backend, BACKENDS)
    name = _auto(device, policy) if backend == "auto" else backend
    if name == "fused" and (reason := launch.unavailable(device)):
        raise ValueError(f"backend: got 'fused', which does not run here: {reason}; wanted 'auto', 'tiled' or 'naive'")
    return name, BACKENDS[name]


def _auto(device: torch.device, policy: Model | None) -> str:
    if device.type != "cuda" or launch.unavailable(device):
        return "tiled"
    if policy is None:
        return "fused"
    if policy.dtype == torch.float64:
        return "tiled"
    V, D = policy.head.weight.shape
    return winner(launch.device_of(device), policy.dtype.itemsize, D, V) or "fused"
