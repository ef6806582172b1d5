"""Multiply in fp32 by oneDNN on AVX-512 CPUs not made by Intel, where MKL, behind `torch.mm`, has half the speed."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

LEAST = 2**23  # multiplications: a smaller product costs more to hand over than it saves


def takes(a: Tensor, b: Tensor) -> bool:
    """Return whether oneDNN is faster at ``a @ b``. It would first copy a matrix that is not contiguous."""
    if a.device.type != "cpu" or a.dtype != torch.float32 or a.numel() * b.shape[1] < LEAST or not mkl_is_held_back():
        return False
    return torch.backends.mkldnn.enabled and a.is_contiguous() and (b.is_contiguous() or b.T.is_contiguous())


def product(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(a, b.T, None, "none", [], "")


@functools.cache
def mkl_is_held_back() -> bool:
    has_op = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not has_op or not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    info = Path("/proc/cpuinfo")
    return "GenuineIntel" not in (info.read_text() if info.exists() else platform.processor())
