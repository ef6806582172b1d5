"""oneDNN's fp32 product, for AVX-512 CPUs not made by Intel: MKL, behind `torch.mm`, has half their speed."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

LEAST = 2**23  # multiplications: a smaller product costs more to hand over than it saves


def takes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether ``a @ b`` is better made here. Of a matrix with gaps oneDNN takes a thousand times as long."""
    if a.device.type != "cpu" or a.dtype != torch.float32 or a.numel() * b.shape[1] < LEAST:
        return False
    return (
        all(x.is_contiguous() or x.T.is_contiguous() for x in (a, b)) and is_faster() and torch.backends.mkldnn.enabled
    )


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(a, b.T, None, "none", [], "")


@functools.cache
def is_faster() -> bool:
    info, there = Path("/proc/cpuinfo"), torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    is_intel = "GenuineIntel" in (info.read_text() if info.exists() else platform.processor())
    has_it = there and hasattr(torch.ops.mkldnn, "_linear_pointwise") and not is_intel
    return has_it and torch.backends.cpu.get_cpu_capability() == "AVX512"
