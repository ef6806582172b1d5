"""Run the law tests, and every kernel under compute-sanitizer: stages that are only done when asked for.

``python -m bench.gpu.asked BACKEND DEVICE`` is what the sanitizer looks at: each variant of the kernels once, small.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from ..problem import make_problem
from ..providers import PROVIDERS
from ..shapes import Shape
from .campaign import ROOT, Facts, Finding, Item, Settings
from .stages import runs_here

MARK = re.compile(r"mark\.gpu\b")
FOUND = 66  # exit status when the tool has found something
PROBE = "import ctypes; raise SystemExit(ctypes.CDLL('libcuda.so.1').cuInit(0))"
NO_POOL = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TDPO_KERNELS_SELF_CHECK": "0"}  # a pool hides what is out of bounds


def laws(settings: Settings) -> list[Item]:
    """Run pytest's tests of the mark `gpu`, a file at a time."""
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if MARK.search(path.read_text()))
    return [
        Item("laws", path.name, partial(_laws, path), 60.0, 20, 400.0) for path in files[: 1 if settings.dry else None]
    ]


def _laws(path: Path) -> Facts:
    command = ["-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider", str(path)]
    done = _run([sys.executable, *command])
    last = ((done.stdout or done.stderr).strip().splitlines() or ["no output"])[-1]
    if done.returncode not in (0, 5):  # 5: none of the mark was selected
        raise Finding(
            "skipped" if "No module named" in last else "failed", f"pytest exits with {done.returncode}: {last}"
        )
    return {"pytest": last}


def _run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    """Run a command in the checkout. The end of what it prints goes to the log."""
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    print(done.stdout[-20000:], done.stderr[-5000:], file=sys.stderr)
    return done


def sanitizer(settings: Settings) -> list[Item]:
    """Look for memory errors and races. A dry run runs the program alone."""
    return [
        Item("sanitizer", f"{check} {backend}", partial(_sanitize, settings, check, backend), 60.0, 12, 300.0)
        for check in (("no tool",) if settings.dry else ("memcheck", "racecheck"))
        for backend in ("fused", "tiled")
    ]


def _sanitize(settings: Settings, check: str, backend: str) -> Facts:
    runs_here(settings.device, backend)
    tool = [] if settings.dry else [_tool(), "--tool", check, "--error-exitcode", str(FOUND)]
    done = _run([*tool, sys.executable, "-m", "bench.gpu.asked", backend, settings.device.type], **NO_POOL)
    lines = done.stdout.splitlines()
    if done.returncode:
        told = [line for line in lines if line.startswith(("variant", "=====")) and "COMPUTE-SANITIZER" not in line]
        why = " ".join(told[-3:] + done.stderr.strip().splitlines()[-1:])
        raise Finding("failed", f"exit {done.returncode}: {why}")
    return {"variants": sum(line.startswith("variant") for line in lines)}


def _tool() -> str:
    """Return where compute-sanitizer is, once it has looked at a program that only opens the device, in 5 seconds."""
    found = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if found is None:
        raise Finding("skipped", "compute-sanitizer is not here")
    try:
        done = subprocess.run([found, sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=5)
    except subprocess.TimeoutExpired:
        raise Finding("skipped", "compute-sanitizer does not get through cuInit in 5 seconds") from None
    if done.returncode:
        raise Finding("skipped", f"compute-sanitizer does not work here: {done.stdout.strip()[-200:]}")
    return found


def program(backend: str, device: str) -> None:
    """Run one small forward and backward of every variant of the kernels, ragged and with a prompt."""
    dtypes = ("float16", "float32", "bfloat16") if device == "cuda" else ("float16", "float32")
    for dtype, kept, D, softcap in itertools.product(dtypes, ("0", "all"), (64, 60), (None, 20.0)):
        print(f"variant {dtype}, {kept} kept, D={D}, softcap {softcap}", flush=True)
        problem = make_problem(Shape("", 72, 387, D, "", (), 1, valid=0.7, softcap=softcap), dtype, device)
        step = PROVIDERS[f"{backend}@{kept}"].step(problem)
        step.backward(step.forward())
        if not all(x.isfinite().all() for x in problem.gradients().values()):
            raise SystemExit("something is not finite")


if __name__ == "__main__":
    program(*sys.argv[1:])
