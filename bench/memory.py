"""Measure one step's peak memory above inputs and gradients: CUDA's allocator, or a fresh process's resident set.

A process of its own, because what a predecessor freed stays with the allocator and would hide what a step takes.
The peak is VmHWM and not getrusage's ru_maxrss, which a child inherits from its parent; it is set back just before the
step where the kernel permits.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from .problem import Problem
from .providers import PROVIDERS
from .shapes import SHAPES, Shape
from .step import Training, setup

STATUS, CLEAR, INFO = (Path("/proc", name) for name in ("self/status", "self/clear_refs", "meminfo"))
ROOT = Path(__file__).resolve().parent.parent
FREE = 0.9  # of what is free may be asked for
ALONE = True  # on a CPU a step is measured in a process of its own
KILLED = -9  # by a system that has no memory left


class MemoryFailure(Exception):
    """Say that the step did not survive on its own, so it must not be tried with others. `room`: it lacked memory."""

    def __init__(self, message: str, room: bool = False) -> None:
        super().__init__(f"out of memory: {message}" if room else message)
        self.room = room


def shortage(needs: int, device: torch.device) -> str:
    """Return why a step that needs about so many bytes is not tried; empty if there is room."""
    free = available(device)
    if free is None or needs <= FREE * free:
        return ""
    return f"out of memory: needs about {needs / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def available(device: torch.device) -> int | None:
    """Return the free bytes, None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _bytes(INFO, "MemAvailable") if INFO.exists() else None


def peak_extra(shape: Shape, dtype: str, name: str, device: torch.device) -> int | None:
    """Return the bytes of a provider's step, None where the system does not tell."""
    if device.type == "cuda" or not ALONE:
        return step_peak(setup(shape, dtype, device), name, device)
    if not STATUS.exists():
        return None
    command = [sys.executable, "-m", "bench.memory", json.dumps(asdict(shape)), dtype, name]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise MemoryFailure(f"exit {child.returncode}: {last}", child.returncode == KILLED)
    return int(child.stdout.split()[-1])


def step_peak(inputs: Problem | Training, name: str, device: torch.device) -> int:
    """Return the peak of a provider's step in this process, above its inputs and gradients."""
    step = inputs.step(PROVIDERS[name].make)

    def run() -> None:
        step.backward(step.forward())

    try:
        if device.type == "cuda":
            run()  # compiles, and gets the libraries' workspaces
            inputs.clear()
        extra = allocator_peak(run, device) if device.type == "cuda" else resident_peak(run)
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryFailure(str(error).splitlines()[0], room=True) from error
    return max(extra - sum(g.nbytes for g in inputs.gradients().values() if g is not None), 0)


def resident_peak(run: Callable[[], object]) -> int:
    """Return how far the resident set of this process rises while `run` runs."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
    before = _bytes(STATUS, "VmRSS")  # the inputs were written, so they are in it
    with contextlib.suppress(OSError):  # else the peak is the process's, which the inputs hardly raise above them
        CLEAR.write_text("5")
    run()
    return max(_bytes(STATUS, "VmHWM") - before, 0)


def allocator_peak(run: Callable[[], object], device: torch.device) -> int:
    """Return how far what CUDA's allocator has given out rises while `run` runs."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _bytes(path: Path, field: str) -> int:
    """Return what a line of a file of the kernel's says."""
    return next(int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith(field))


def main(shape: str, dtype: str, name: str) -> None:
    """Measure in a fresh process. A tiny step first brings in thread pools and library buffers: not the step's own."""
    cpu = torch.device("cpu")
    step_peak(setup(SHAPES["tiny"], dtype, cpu), name, cpu)
    print(step_peak(setup(Shape(**json.loads(shape)), dtype, cpu), name, cpu))


if __name__ == "__main__":
    main(*sys.argv[1:])
