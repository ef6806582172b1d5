"""The device under test: its clock, its memory, what it is called, and tensors on it.

A dry run is the same on a CPU: Triton's interpreter, a wall clock, and a ledger of torch's allocations.
"""

from __future__ import annotations

import gc
import random
import subprocess
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tdpo_kernels import backends
from tdpo_kernels.verify import DTYPES

from ..conditions import cpu_model
from ..problem import Problem
from .plan import Facts

Step = Callable[[], object]


class Device:
    """``cuda``, or ``cpu`` in a dry run."""

    def __init__(self, name: str) -> None:
        self.torch = torch.device(name)
        self.is_cuda = self.torch.type == "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.torch) if self.is_cuda else f"dry run on {cpu_model()}"

    def facts(self) -> Facts:
        return {"device": self.name, "torch": torch.__version__, "triton": triton_version()}

    def clean(self) -> None:
        gc.collect()
        if self.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def free(self) -> int | None:
        """Bytes; None where nobody knows."""
        return torch.cuda.mem_get_info(self.torch)[0] if self.is_cuda else None

    def seconds(self, step: Step) -> float:
        """Of one call, on the device's clock, from an idle device on."""
        if not self.is_cuda:
            began = time.perf_counter()
            step()
            return time.perf_counter() - began
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def times(self, steps: dict[str, Step], rounds: int, calls: int, clear: Step) -> dict[str, list[float]]:
        """Seconds per call of each step in each round, interleaved in a new random order every round. One untimed
        round goes first; `clear` is called before every step, outside the clock."""
        found: dict[str, list[float]] = {name: [] for name in steps}
        order, shuffle = list(steps), random.Random(0).shuffle
        gc.collect()
        gc.disable()
        try:
            for turn in range(rounds + 1):
                shuffle(order)
                for name in order:
                    total = 0.0
                    for _ in range(calls):
                        clear()
                        total += self.seconds(steps[name])
                    if turn:
                        found[name].append(total / calls)
        finally:
            gc.enable()
            clear()
        return found

    def peak(self, step: Step) -> int:
        """Bytes held at most during `step`, above what was held before it."""
        if not self.is_cuda:
            with Ledger() as book:
                step()
            return book.peak
        self.clean()
        torch.cuda.reset_peak_memory_stats(self.torch)
        before = torch.cuda.memory_allocated(self.torch)
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(self.torch) - before


class Ledger(TorchDispatchMode):
    """Bytes of storages made under it that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in known:
                self._note(x.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))


def open_device(dry: bool) -> Device:
    """
    Raises:
        RuntimeError: there is no GPU, and the run is not dry.
    """
    if not dry and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device; --dry goes through the motions on a CPU")
    if dry:
        torch.set_num_threads(1)  # many tiny products: threads only wait for one another
    return Device("cpu" if dry else "cuda")


def triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


def runnable(device: Device) -> dict[str, str]:
    """Every backend, and why it cannot run on the device; empty if it can."""
    told = backends.availability(device.torch)
    return {name: "" if told.get(name, "available").startswith("available") else told[name] for name in every_backend()}


def every_backend() -> list[str]:
    """With `fused`, if it can be imported, even where it is not among the backends yet."""
    if "fused" not in backends.BACKENDS:
        try:
            from tdpo_kernels.backends import fused
        except ImportError:
            return list(backends.BACKENDS)
        backends.BACKENDS["fused"] = fused
    return list(backends.BACKENDS)


def lacks(device: Device, backend: str, dtype: str) -> bool:
    """Whether the backend takes no such inputs here; `dtype` is torch's name or `verify`'s."""
    return bool(backends.lacks(backend, device.torch, DTYPES.get(dtype) or getattr(torch, dtype)))


def gemm(problem: Problem, rows: int = 8192) -> Step:
    """One library product of 2 T V D flops, `rows` rows at a time into one buffer, as large T would not fit."""
    hidden, weight = problem.hidden.detach().flatten(0, 1), problem.weight.detach()
    blocks = hidden.split(rows)
    out = hidden.new_empty(min(rows, hidden.shape[0]), weight.shape[0])

    def step() -> None:
        for block in blocks:
            torch.mm(block, weight.T, out=out[: block.shape[0]])

    return step


def bytes_of(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def ask_driver(*fields: str) -> dict[str, str]:
    """What ``nvidia-smi`` says of the first device; nothing where it is not there."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}
