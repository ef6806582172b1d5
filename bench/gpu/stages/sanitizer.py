"""Every kernel once on tiny shapes, under compute-sanitizer where there is one: memory errors, and races."""

from __future__ import annotations

import os
import subprocess
import sys

from ..device import Device, runnable
from ..plan import ROOT, Facts, Failed, Item, Settings, Skipped
from .env import tool

CHECKS = ("memcheck", "racecheck")
FOUND = 66  # exit status when the tool has found something


def items(device: Device, settings: Settings) -> list[Item]:
    checks = ("none",) if settings.dry else CHECKS
    return [
        Item(f"{check} {backend}", lambda c=check, b=backend: run(device, c, b), 60, 400)
        for check in checks
        for backend in runnable(device)
        if backend != "naive"
    ]


def run(device: Device, check: str, backend: str) -> Facts:
    """`none` runs the program alone: what a dry run can do."""
    if why := runnable(device)[backend]:
        raise Skipped(why)
    command = [sys.executable, "-m", "bench.gpu.tiny", backend, device.torch.type]
    if check != "none":
        sanitizer = tool("compute-sanitizer")
        if sanitizer is None:
            raise Skipped("compute-sanitizer is not here")
        command = [sanitizer, "--tool", check, "--error-exitcode", str(FOUND), *command]
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or a pool hides what is out of bounds
    env |= {"TDPO_KERNELS_SELF_CHECK": "0"}  # only kernels are looked at
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    lines = done.stdout.splitlines()
    told = [line for line in lines if line.startswith("=========")]
    if done.returncode:
        variant = next((line for line in reversed(lines) if line.startswith("variant")), "before the first variant")
        raise Failed(f"exit {done.returncode}: {_complaint(told, done.stderr)} (last: {variant})", {"told": told[:40]})
    return {"variants": sum(line.startswith("variant") for line in lines), "told": told[-1:]}


def _complaint(told: list[str], errors: str) -> str:
    lines = [line.strip("= ") for line in told if "COMPUTE-SANITIZER" not in line]
    return next((line for line in lines if line), (errors.strip().splitlines() or ["no message"])[-1])
