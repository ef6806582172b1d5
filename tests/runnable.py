"""Every backend there is, as test parameters: a later one joins by itself, or is skipped with its own reason."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from tdpo_kernels.backends import availability, lacks, launch


def interpreting() -> bool:
    """Whether this process runs the kernels, on a CPU: ``TRITON_INTERPRET=1 python -m pytest``."""
    return not launch.unavailable(torch.device("cpu"))


def reasons(device: str = "cpu") -> dict[str, str | None]:
    """Each backend, and why it cannot run on `device`; None where it can."""
    every = availability(torch.device(device))
    found = {name: None if said.startswith("available") else said for name, said in every.items()}
    return found | ({"naive": "has no kernels to interpret"} if interpreting() else {})


def runnable(device: str = "cpu", *dtypes: torch.dtype) -> list[str]:
    """The backends that run on `device` and take inputs of these dtypes."""
    names = [name for name, why_not in reasons(device).items() if why_not is None]
    return [name for name in names if not any(lacks(name, torch.device(device), dtype) for dtype in dtypes)]


def backend_params(device: str = "cpu") -> list:
    """For ``pytest.mark.parametrize("backend", ...)``."""
    return [
        pytest.param(name, marks=[] if why_not is None else pytest.mark.skip(reason=f"{name}: {why_not}"))
        for name, why_not in reasons(device).items()
    ]


def mainly(kept: tuple, every: Iterable) -> list:
    """Every value, those that are not `kept` marked long: interpreted kernels are looked at with a few of each kind in
    `make test`, with all in `make interpreted`."""
    return [x if x in kept else pytest.param(x, marks=pytest.mark.long) for x in every]
