"""Peak memory of one step above its inputs and its gradients: CUDA's allocator, or the resident set of a fresh process.

A process of its own, because what a predecessor freed stays with the allocator and would hide what a step takes.
The peak is VmHWM and not getrusage's ru_maxrss, which a child inherits from its parent; it is set back just before the
step where the kernel permits.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from .problem import Problem, make_problem
from .providers import PROVIDERS
from .shapes import SHAPES, Shape

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ROOT = Path(__file__).resolve().parent.parent
FREE = 0.9  # of what is free may be asked for


KILLED = -9  # by a system that has no memory left


class MemoryFailure(Exception):
    """The step did not survive in a process of its own, so it must not be tried in ours. `room`: it lacked memory."""

    def __init__(self, message: str, room: bool = False) -> None:
        super().__init__(f"out of memory: {message}" if room else message)
        self.room = room


def shortage(needs: int, device: torch.device) -> str:
    """Why a step that needs about so many bytes is not tried; empty if there is room."""
    free = available(device)
    if free is None or needs <= FREE * free:
        return ""
    return f"out of memory: needs about {needs / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def available(device: torch.device) -> int | None:
    """Bytes; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def peak_extra(shape: Shape, dtype: str, name: str, device: torch.device) -> int | None:
    """Bytes, or None where the system does not tell."""
    if device.type == "cuda":
        return _on_cuda(shape, dtype, name, device)
    return in_a_process_of_its_own("bench.memory", json.dumps(asdict(shape)), dtype, name)


def in_a_process_of_its_own(module: str, *arguments: str) -> int | None:
    """What `module` prints last, a number of bytes."""
    if not STATUS.exists():
        return None
    child = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise MemoryFailure(f"exit {child.returncode}: {last}", child.returncode == KILLED)
    return int(child.stdout.split()[-1])


def measure(shape: Shape, dtype: str, name: str) -> int:
    """In the fresh process. A tiny step first brings in thread pools and library buffers: not the step's own."""
    _once(make_problem(SHAPES["tiny"], dtype), name)
    problem = make_problem(shape, dtype)
    step = PROVIDERS[name].make(problem)
    extra = resident_peak(lambda: step.backward(step.forward()))
    return max(extra - _gradients(problem), 0)


def resident_peak(run: Callable[[], object]) -> int:
    """How far the resident set of this process rises while it runs."""
    gc.collect()
    _give_back_freed_pages()
    before = _resident("VmRSS")  # the inputs were written, so they are in it
    _forget_peak()
    run()
    return max(_resident("VmHWM") - before, 0)


def allocator_peak(run: Callable[[], object], device: torch.device) -> int:
    """How far what CUDA's allocator has given out rises while it runs."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _on_cuda(shape: Shape, dtype: str, name: str, device: torch.device) -> int:
    problem = make_problem(shape, dtype, device)
    step = PROVIDERS[name].make(problem)
    try:
        step.backward(step.forward())  # compiles, and gets the libraries' workspaces
        problem.clear()
        extra = allocator_peak(lambda: step.backward(step.forward()), device)
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryFailure(str(error).splitlines()[0], room=True) from error
    return max(extra - _gradients(problem), 0)


def _once(problem: Problem, name: str) -> None:
    step = PROVIDERS[name].make(problem)
    step.backward(step.forward())


def _gradients(problem: Problem) -> int:
    return sum(g.numel() * g.element_size() for g in problem.gradients().values() if g is not None)


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _forget_peak() -> None:
    try:
        CLEAR.write_text("5")
    except OSError:
        pass  # then the peak is the process's, which building the inputs hardly raises above them


def _give_back_freed_pages() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    shape_json, dtype_name, provider_name = sys.argv[1:]
    print(measure(Shape(**json.loads(shape_json)), dtype_name, provider_name))
