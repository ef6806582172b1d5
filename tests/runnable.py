"""Every backend there is, as test parameters: a later one joins by itself, and one that cannot run here makes no test
but that which says why (`test_contract`)."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import pytest
import torch

from tdpo_kernels.backends import availability, grid, lacks, launch

__all__ = ["backends", "grid", "interpreting", "mainly", "reasons", "runnable", "set_tiles"]


def interpreting() -> bool:
    """Return whether this process runs the kernels, on a CPU: ``TRITON_INTERPRET=1 python -m pytest``."""
    return not launch.unavailable(torch.device("cpu"))


@functools.cache
def reasons(device: str = "cpu") -> dict[str, str | None]:
    """Return each backend, and why it cannot run on `device`; None where it can."""
    every = availability(torch.device(device))
    found = {name: None if said.startswith("available") else said for name, said in every.items()}
    return found | ({"naive": "has no kernels to interpret"} if interpreting() else {})


def takes(backend: str, dtype: torch.dtype, device: str = "cpu") -> bool:
    """Return whether a backend that runs on `device` takes inputs of this dtype; float64 is no matter of kernels."""
    return not lacks(backend, torch.device(device), dtype) and not (interpreting() and dtype == torch.float64)


def runnable(device: str = "cpu", *dtypes: torch.dtype) -> list[str]:
    """Return the backends that run on `device` and take inputs of these dtypes."""
    names = [name for name, why_not in reasons(device).items() if why_not is None]
    return [name for name in names if all(takes(name, dtype, device) for dtype in dtypes)]


backends = pytest.mark.parametrize("backend", runnable())


def mainly(kept: tuple, every: Iterable) -> list:
    """Return every value, those that are not `kept` marked long: interpreted kernels are looked at with a few of each
    kind in `make test`, with all in `make interpreted`."""
    return [x if x in kept else pytest.param(x, marks=pytest.mark.long) for x in every]


def set_tiles(rows: int, cols: int) -> None:
    """Cut [T, V] into tiles of at most this size, in this process, for good."""
    for device in grid.TILE:
        grid.TILE[device] = (rows, cols)
