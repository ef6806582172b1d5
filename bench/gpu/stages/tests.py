"""The tests that are marked `gpu`, the laws on CUDA among them, where pytest is installed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from ..device import Device
from ..plan import ROOT, Facts, Failed, Item, Settings, Skipped

NEEDED = ("pytest", "hypothesis")
MARK = re.compile(r"mark\.gpu\b")
KERNELS = ("float32", "bfloat16", "float16 and not bfloat16")  # dtypes that compile dozens of each backend's
SPLIT = {  # files that take long, in parts
    "test_laws.py": (
        "float64",
        *(f"{dtype} and {backend}" for dtype in KERNELS for backend in ("fused", "not fused")),
        "not float",
    ),
}
NOTHING_SELECTED = 5


def items(device: Device, settings: Settings) -> list[Item]:
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if MARK.search(path.read_text()))
    parts = [(path, part) for path in files for part in SPLIT.get(path.name, ("",))]
    parts = parts[:1] if settings.dry else parts
    return [
        Item(f"{path.relative_to(ROOT / 'tests')} {part}".strip(), lambda p=path, k=part: run(p, k), 30, 400)
        for path, part in parts
    ]


def run(path: Path, part: str) -> Facts:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise Skipped(f"{' and '.join(missing)} not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider", str(path)]
    command += ["-k", part] if part else []
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    if done.returncode not in (0, NOTHING_SELECTED):
        raise Failed(f"pytest exits with {done.returncode}: {last}", {"pytest": last})
    return {"pytest": last}
