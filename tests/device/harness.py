"""Launches under Triton's interpreter with every address checked.

Importing this skips the importing module unless ``TRITON_INTERPRET=1`` was set when the process began.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import bounds
from torch import Tensor

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip(
        "device code is interpreted in a process of its own: TRITON_INTERPRET=1 python -m pytest tests/device",
        allow_module_level=True,
    )

F16, F32, F64 = torch.float16, torch.float32, torch.float64
NAN = float("nan")


# --- launches ---------------------------------------------------------------------------------------------------------


def launch(kernel: Any, grid: tuple[int, ...], *args: Any) -> None:
    """`kernel` on `grid`, within its arguments' memory."""
    with bounds(*(x for x in args if isinstance(x, Tensor))):
        kernel[grid](*args)


def poisoned(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    """An output: what a kernel leaves alone stays NaN."""
    return torch.full(shape, NAN, dtype=dtype)


def strided(x: Tensor, spare: int = 8) -> Tensor:
    """x with `spare` more columns of NaN between its rows."""
    out = torch.full((x.shape[0], x.shape[1] + spare), NAN, dtype=x.dtype)
    out[:, : x.shape[1]] = x
    return out[:, : x.shape[1]]
