"""What it was all measured on, and how fast that is at the two things everything else is made of."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

import torch

from ..device import Device, ask_driver, runnable
from ..plan import Facts, Item, Settings

TOOLS = ("compute-sanitizer", "nsys", "ncu", "cuobjdump", "nvdisasm")
PACKAGES = ("numpy", "transformers", "pytest", "hypothesis")
DRIVER = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu",
    "clocks_event_reasons.active",
)  # fmt: skip


def items(device: Device, settings: Settings) -> list[Item]:
    return [Item("machine", lambda: machine(device, settings)), Item("ceilings", lambda: ceilings(device))]


def machine(device: Device, settings: Settings) -> Facts:
    facts = {
        **device.facts(),
        "python": platform.python_version(),
        "cpu cores": os.cpu_count(),
        "cuda": torch.version.cuda,
        "commit": settings.commit + (" + changes" if settings.dirty else ""),
        "backends": {name: why or "runs" for name, why in runnable(device).items()},
        "tools": {name: "yes" if tool(name) else "no" for name in TOOLS},
        "packages": {name: version(name) for name in PACKAGES},
        "fp32 products": torch.get_float32_matmul_precision(),
    }
    if device.is_cuda:
        properties = torch.cuda.get_device_properties(device.torch)
        facts |= {
            "driver": ask_driver(*DRIVER) or ask_driver(*DRIVER[:-1]),
            "devices": torch.cuda.device_count(),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "free": device.free(),
        }
    return facts


def ceilings(device: Device) -> Facts:
    """Random data: on zeros a product runs faster."""
    n, size = (8192, 2**32) if device.is_cuda else (128, 2**20)
    a, b = (torch.randn(n, n, device=device.torch).bfloat16() for _ in range(2))
    x = torch.empty(size, dtype=torch.uint8, device=device.torch)
    y = torch.empty_like(x)
    steps = {"mm": lambda: torch.mm(a, b.T), "copy": lambda: y.copy_(x)}
    times = device.times(steps, 10, 1, lambda: None)
    best, worst = (min(times["mm"]), max(times["mm"]))
    return {
        "bf16 product, TFLOP/s": [2 * n**3 / worst / 1e12, 2 * n**3 / best / 1e12],
        "copy, read + written, TB/s": 2 * size / sorted(times["copy"])[5] / 1e12,
        "clocks after": ask_driver("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw"),
    }


def tool(name: str) -> str | None:
    """Where it is: on the path, or in the CUDA installation that torch finds."""
    if found := shutil.which(name):
        return found
    try:
        from torch.utils.cpp_extension import CUDA_HOME
    except Exception:  # it wants setuptools, and more
        CUDA_HOME = os.environ.get("CUDA_HOME")
    path = Path(CUDA_HOME or "/nowhere", "bin", name)
    return str(path) if path.exists() else None


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
