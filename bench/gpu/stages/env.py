"""What it was all measured on, and how fast that is at the two things everything else is made of."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path

import torch

from tdpo_kernels.backends.products import SIXTEEN_BIT, operand_dtype

from ..device import Device, ask_driver, runnable
from ..plan import Facts, Failed, Item, Settings

TOOLS = ("compute-sanitizer", "nsys", "ncu", "cuobjdump", "nvdisasm")
PACKAGES = ("numpy", "transformers", "pytest", "hypothesis")
DRIVER = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu",
    "clocks_event_reasons.active",
)  # fmt: skip


def items(device: Device, settings: Settings) -> list[Item]:
    return [
        Item("machine", lambda: machine(device, settings)),
        Item("products", lambda: products(device)),
        Item("ceilings", lambda: ceilings(device)),
    ]


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


def products(device: Device) -> Facts:
    """Whether 16-bit operands multiply into fp32, as `products.py` takes for granted where it does not widen them."""
    found = {dtype: into_fp32(device, dtype) for dtype in SIXTEEN_BIT}
    facts: Facts = {f"{dtype} products into fp32": said for dtype, said in found.items()}
    widens = operand_dtype(torch.bfloat16, torch.float32, device.torch) == torch.float32
    facts["products.py"] = "widens operands to fp32" if widens else "multiplies 16-bit operands into fp32"
    if not widens and set(found.values()) != {"ok"}:
        raise Failed("; ".join(f"{dtype}: {said}" for dtype, said in found.items()), facts)
    return facts


def into_fp32(device: Device, dtype: torch.dtype) -> str:
    """``ok``, or what is wrong with products made as `logits_` and `accumulate_` make them, of rows that lie apart."""
    a, b = (torch.randn(n, 72, device=device.torch).to(dtype)[:, :65] for n in (96, 80))
    out = torch.empty(96, 96, device=device.torch)[:, :80]
    try:
        torch.mm(a, b.T, out_dtype=out.dtype, out=out)
        pairs = (out, a.double() @ b.double().T), (torch.mm(a.T, a, out_dtype=out.dtype), a.double().T @ a.double())
    except (RuntimeError, TypeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:160]
    off = max(float((x.double() - y).norm() / y.norm()) for x, y in pairs)
    return "ok" if off < 1e-5 else f"off by {off:.1e}, as what was rounded to 16 bits is"


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
