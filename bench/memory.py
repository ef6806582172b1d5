"""Peak memory of one step above its inputs and its gradients, from the resident set of a fresh process.

A process of its own, because what a predecessor freed stays with the allocator and would hide what a step takes.
The peak is VmHWM and not getrusage's ru_maxrss, which a child inherits from its parent; it is set back just before the
step where the kernel permits.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from pathlib import Path

from .problem import make_problem
from .providers import PROVIDERS
from .shapes import SHAPES, Shape

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ROOT = Path(__file__).resolve().parent.parent


class MemoryFailure(Exception):
    """The step did not survive in a process of its own, so it must not be tried in ours."""


def peak_extra(shape: Shape, dtype: str, name: str) -> int | None:
    """Bytes, or None where the system does not tell."""
    if not STATUS.exists():
        return None
    command = [sys.executable, "-m", "bench.memory", shape.name, dtype, name]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise MemoryFailure(f"exit {child.returncode}: {last}")
    return int(child.stdout.split()[-1])


def measure(shape: Shape, dtype: str, name: str) -> int:
    """In the fresh process. A tiny step first brings in thread pools and library buffers: not the step's own."""
    PROVIDERS[name].make(make_problem(SHAPES["tiny"], dtype))()
    problem = make_problem(shape, dtype)
    step = PROVIDERS[name].make(problem)
    gc.collect()
    _give_back_freed_pages()
    before = _resident("VmRSS")  # the inputs were written, so they are in it
    _forget_peak()
    step()
    gradients = sum(g.numel() * g.element_size() for g in problem.gradients().values())
    return max(_resident("VmHWM") - before - gradients, 0)


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
    shape_name, dtype_name, provider_name = sys.argv[1:]
    print(measure(SHAPES[shape_name], dtype_name, provider_name))
