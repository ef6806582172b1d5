"""Triton's interpreter as the tests want it: bf16 is rounded as on a device, and every address is checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def round_bf16() -> None:
    """Round bf16 to the nearest, as a device does, from here on, in this process.

    The interpreter itself cuts off what does not fit, which is twice as far off, and always to the same side.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def rounded(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16)
        return TensorHandle(bits.numpy().view(np.uint16).reshape(src.data.shape), dst_type.scalar)

    InterpreterBuilder.cast_impl = rounded


@contextmanager
def bounds(*given: object) -> Iterator[None]:
    """Raise an AssertionError if a kernel touches memory that is not of the tensors among these arguments.

    What exp() overflows to in the branch that a tl.where does not take is no news, nor is what is computed from that.
    """
    from triton.runtime.interpreter import InterpreterBuilder as builder

    spans = np.array([_span(x) for x in given if isinstance(x, Tensor)], dtype=np.uint64)
    load, store = builder.create_masked_load, builder.create_masked_store

    def check(what: str, ptrs: Any, mask: Any) -> None:
        every = np.atleast_1d(ptrs.data)
        at = every[np.broadcast_to(np.atleast_1d(mask.data), every.shape)]
        within = at.size == 0 or ((at.min() >= spans[:, 0]) & (at.max() < spans[:, 1])).any()
        assert within, f"a {what} of {at.size} elements is not within one argument"

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
    """Return the first address of what a view covers, and the one behind its last."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def check_addresses() -> None:
    """Hold every launch of the library to its arguments' memory, from here on, in this process."""
    from tdpo_kernels.backends import launch

    plain = launch.Kernels.launch

    def launched(self: Any, kernel: str, T: int, V: int, tensors: Any, heads: Any, **arguments: Any) -> None:
        with bounds(*tensors, *(head.bias for head in heads), *arguments.values()):
            plain(self, kernel, T, V, tensors, heads, **arguments)

    launch.Kernels.launch = launched
