"""Choose a way to compute the token statistics. `choose` alone decides, and `availability` says why."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import torch

from ..checks import check_backend
from ..tuning import winner
from ..types import Inputs, Model
from . import launch
from .kerneltiles import FusedTiles, RowTiles
from .tiled import TorchTiles, naive
from .walk import Backend


def _tiled(inputs: Inputs) -> TorchTiles | RowTiles:
    by_kernels = inputs.stats_dtype == torch.float32 and not launch.unavailable(inputs.policy.hidden.device)
    return RowTiles(inputs) if by_kernels else TorchTiles(inputs)


BACKENDS = {"fused": Backend(FusedTiles), "tiled": Backend(_tiled), "naive": Backend(naive)}
TILED_FROM = 2048  # the hidden size from which a model of a GPU, not a measurement, expects `tiled` to be faster
KERNELS = {"fused": FusedTiles.KERNELS, "tiled": RowTiles.KERNELS}


def availability(device: torch.device) -> dict[str, str]:
    """Return each backend and whether it can run on `device`: ``"available: ..."`` or the reason why not."""
    missing, on = launch.unavailable(device), f"on {device.type}"
    by = "torch operations" if missing else "Triton row kernels"
    said = {
        "fused": f"Triton kernels that make logits in registers, {on}",
        "tiled": f"library GEMMs make logits in cache-sized tiles, {by} reduce them, {on}",
        "naive": f"keeps [T, V] logits; a baseline and debugging switch, {on}",
    }
    for name, made_by in KERNELS.items() if not missing else ():
        said[name] += f"; the first steps compile {len(made_by)} kernels"
    found = {name: f"available: {words}" for name, words in said.items()}
    return found | ({"fused": f"unavailable: {missing}"} if missing else {})


@cache
def _warn_once(device: torch.device, missing: str) -> None:
    warnings.warn(
        f"tdpo_kernels: no kernel runs on {device}, torch operations do their work, slower: {missing}", RuntimeWarning,
        stacklevel=2,
    )  # fmt: skip


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
    """Return a backend's name and the backend, or raise ValueError if the one that is named does not run.

    ``"auto"`` takes the backend measured to be the fastest at such sizes on such a GPU, or the one estimated to be
    where nothing was measured. Elsewhere it takes `tiled`, which warns once where it must do without kernels on an
    accelerator. `sides` are policy and reference, if they are known.
    """
    check_backend(backend, BACKENDS)
    name = _auto(device, sides) if backend == "auto" else backend
    if reason := _refusal(name, device, sides):
        raise ValueError(f"backend: got {name!r}, which does not run here: {reason}; wanted 'auto', 'tiled' or 'naive'")
    if name == "tiled" and device.type not in ("cpu", "meta") and (missing := launch.unavailable(device)):
        _warn_once(device, missing)
    return name, BACKENDS[name]


def auto_says(device: torch.device) -> str:
    """Return what ``"auto"`` takes on `device`, in words."""
    if device.type != "cuda" or _refusal("fused", device, ()):
        return "tiled"
    if winner(launch.device_of(device), 2, 4096, 128256):
        return "the faster of fused and tiled at the measured sizes nearest to a call's"
    return f"tiled where D >= {TILED_FROM}, fused below; estimated, not measured"


def _refusal(name: str, device: torch.device, sides: Sequence[Model]) -> str:
    if name != "fused":
        return ""
    dtypes = {dtype for side in sides for dtype in (side.dtype, side.hidden.dtype)}
    return launch.unavailable(device) or next(filter(None, (lacks(name, device, dtype) for dtype in dtypes)), "")


def _auto(device: torch.device, sides: Sequence[Model]) -> str:
    if not sides or device.type != "cuda" or _refusal("fused", device, sides):
        return "tiled"
    V, D = sides[0].head.weight.shape
    return winner(launch.device_of(device), sides[0].dtype.itemsize, D, V) or ("tiled" if D >= TILED_FROM else "fused")
