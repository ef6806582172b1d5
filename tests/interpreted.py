"""Triton's interpreter as the tests want it: bf16 rounded to the nearest, as on a device. The interpreter itself cuts
off what does not fit, which is twice as far off, and always to the same side."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def round_bf16() -> None:
    """Round bf16 as a device does, from here on, in this process."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def rounded(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16)
        return TensorHandle(bits.numpy().view(np.uint16).reshape(src.data.shape), dst_type.scalar)

    InterpreterBuilder.cast_impl = rounded
