"""Choose a way to compute the token statistics. `choose` alone decides, and `availability` says why."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..checks import check_backend
from ..tuning import estimated_winner, winner
from ..types import Backend, Model
from . import fused, kerneltiles, launch, naive, tiled

BACKENDS: dict[str, Backend] = {"fused": fused, "tiled": tiled, "naive": naive}


def availability(device: torch.device) -> dict[str, str]:
    """Return each backend and whether it can run on `device`: ``"available: ..."`` or the reason why not."""
    missing, rows = (
        launch.unavailable(device),
        "Triton row kernels" if kerneltiles.runs_on(device) else "torch operations",
    )
    fused_says = f"available: Triton kernels that make logits in registers, on {device.type}"
    return {
        "fused": fused_says if not missing else f"unavailable: {missing}",
        "tiled": f"available: library GEMMs make logits in cache-sized tiles, {rows} reduce them, on {device.type}",
        "naive": f"available: keeps [T, V] logits; a baseline and debugging switch, on {device.type}",
    }


def lacks(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return why a backend that runs on `device` takes no inputs of this dtype, or "" if it does."""
    if backend != "fused":
        return ""
    if dtype == torch.float64:
        return "its kernels add up in fp32: float64 is for 'tiled' or 'naive'"
    if dtype == torch.bfloat16 and device.type == "cpu":
        return "Triton's interpreter multiplies the raw bits of bf16: 'tiled' or 'naive' take it"
    return ""


def choose(backend: str, device: torch.device, sides: Sequence[Model] = ()) -> tuple[str, Backend]:
    """Return a backend's name and module, or raise ValueError if the one that is named does not run.

    ``"auto"`` takes the backend measured to be the fastest at such sizes on such a GPU, or the one estimated to be
    where nothing was measured. Elsewhere it takes `tiled`. `sides` are policy and reference, if they are known.
    """
    check_backend(backend, BACKENDS)
    name = _auto(device, sides) if backend == "auto" else backend
    if reason := _refusal(name, device, sides):
        raise ValueError(f"backend: got {name!r}, which does not run here: {reason}; wanted 'auto', 'tiled' or 'naive'")
    return name, BACKENDS[name]


def auto_says(device: torch.device) -> str:
    """Return what ``"auto"`` takes on `device`, in words."""
    if device.type != "cuda" or _refusal("fused", device, ()):
        return "tiled"
    if winner(launch.device_of(device), 2, 4096, 128256):
        return "the faster of fused and tiled at the measured sizes nearest to a call's"
    return "tiled where D >= 2048, fused below; estimated, not measured"


def _refusal(name: str, device: torch.device, sides: Sequence[Model]) -> str:
    if name != "fused":
        return ""
    dtypes = {dtype for side in sides for dtype in (side.dtype, side.hidden.dtype)}
    return launch.unavailable(device) or next(filter(None, (lacks(name, device, dtype) for dtype in dtypes)), "")


def _auto(device: torch.device, sides: Sequence[Model]) -> str:
    if device.type != "cuda" or _refusal("fused", device, sides):
        return "tiled"
    if not sides:
        return "tiled"
    V, D = sides[0].head.weight.shape
    return winner(launch.device_of(device), sides[0].dtype.itemsize, D, V) or estimated_winner(D)
