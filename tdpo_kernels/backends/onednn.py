"""oneDNN's fp32 product, for AVX-512 CPUs not made by Intel: MKL, behind `torch.mm`, has half their speed."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

LEAST = 2**23  # multiplications: a smaller product costs more to hand over than it saves


def takes(a: Tensor, b: Tensor) -> bool:
    """Return whether ``a @ b`` is better made here. Rows (or columns) that do not lie side by side it would reorder."""
    if a.device.type != "cpu" or a.dtype != torch.float32 or a.numel() * b.shape[1] < LEAST or not held_back():
        return False
    return torch.backends.mkldnn.enabled and a.is_contiguous() and (b.is_contiguous() or b.T.is_contiguous())


def product(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(a, b.T, None, "none", [], "")


@functools.cache
def held_back() -> bool:
    has_op = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not has_op or not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    info = Path("/proc/cpuinfo")
    return "GenuineIntel" not in (info.read_text() if info.exists() else platform.processor())
