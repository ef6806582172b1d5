"""Launches under Triton's interpreter with every address checked.

Importing this skips the importing module unless ``TRITON_INTERPRET=1`` was set when the process began.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip(
        "device code is interpreted in a process of its own: TRITON_INTERPRET=1 python -m pytest tests/device",
        allow_module_level=True,
    )

from triton.runtime import interpreter  # noqa: E402

F16, F32, F64 = torch.float16, torch.float32, torch.float64
NAN = float("nan")


# --- launches ---------------------------------------------------------------------------------------------------------


def launch(kernel: Any, grid: tuple[int, ...], *args: Any) -> None:
    """`kernel` on `grid`, within its arguments' memory."""
    with bounds(*(x for x in args if isinstance(x, Tensor))):
        kernel[grid](*args)


@contextmanager
def bounds(*given: Tensor | None) -> Iterator[None]:
    """An AssertionError if a kernel touches memory that is not these tensors'. What exp() overflows to in the branch
    that a tl.where does not take is no news, nor is what is computed from that."""
    tensors = [x for x in given if x is not None]
    spans = np.array([_span(x) for x in tensors], dtype=np.uint64)
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    faults: list[str] = []

    def check(what: str, ptrs: Any, mask: Any) -> None:
        at = np.atleast_1d(ptrs.data)[np.broadcast_to(np.atleast_1d(mask.data), np.shape(np.atleast_1d(ptrs.data)))]
        inside = ((at[:, None] >= spans[:, 0]) & (at[:, None] < spans[:, 1])).any(1)
        if not inside.all():
            faults.append(f"{what} of {int((~inside).sum())} elements outside every argument")
            raise AssertionError(faults[-1])

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        check("load", ptrs, mask)
        return load(self, ptrs, mask, *rest, **more)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        check("store", ptrs, mask)
        return store(self, ptrs, value, mask, *rest, **more)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def _span(x: Tensor) -> tuple[int, int]:
    """First and last address of what a view covers."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def poisoned(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    """An output: what a kernel leaves alone stays NaN."""
    return torch.full(shape, NAN, dtype=dtype)


def strided(x: Tensor, spare: int = 8) -> Tensor:
    """x with `spare` more columns of NaN between its rows."""
    out = torch.full((x.shape[0], x.shape[1] + spare), NAN, dtype=x.dtype)
    out[:, : x.shape[1]] = x
    return out[:, : x.shape[1]]


def power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def padded(x: Tensor, fill: float) -> Tensor:
    """``(R, C)`` or ``(R,)`` up to powers of 2."""
    out = torch.full([power_of_2(n) for n in x.shape], fill, dtype=x.dtype)
    out[tuple(slice(n) for n in x.shape)] = x
    return out
