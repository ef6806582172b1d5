"""Joules, where the device reports them: NVIDIA's own counter on CUDA, the package counter of a CPU's powercap."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")


def meter(device: torch.device) -> Callable[[], float] | None:
    """A function that reads joules since some beginning, or None where nothing reports them."""
    return _nvml(device) if device.type == "cuda" else _powercap()


def _nvml(device: torch.device) -> Callable[[], float] | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # not installed, no permission, not supported: each in a way of its own
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3


def _powercap(folder: Path = POWERCAP) -> Callable[[], float] | None:
    counters = sorted(folder.glob("intel-rapl:[0-9]*/energy_uj"))
    packages = [path for path in counters if path.parent.name.count(":") == 1]
    try:
        readable = bool(packages) and all(path.read_text() for path in packages)
    except OSError:
        return None
    return (lambda: sum(int(path.read_text()) for path in packages) / 1e6) if readable else None
