"""Record under what conditions a row was measured. A number without them is a rumour."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT, INFO, STAT = Path(__file__).resolve().parent.parent, Path("/proc/cpuinfo"), Path("/proc/stat")
PACKAGES = ("triton", "trl", "liger-kernel", "cut-cross-entropy", "transformers")


@dataclass(frozen=True)
class Conditions:
    device: str
    threads: int
    torch: str
    python: str
    commit: str
    dirty: bool
    date: str  # UTC
    system: str = ""
    cores: int | None = None
    memory_bytes: int | None = None  # of the device
    driver: str = ""
    packages: str = ""

    @classmethod
    def parse(cls, data: dict) -> Conditions:
        """Return the conditions of a line of JSON. What older ones had and these no longer have is left out."""
        return cls(**{field.name: data[field.name] for field in fields(cls) if field.name in data})

    @property
    def said(self) -> str:
        """Return a line for the foot of a figure."""
        commit = f"{self.commit}{' + changes' if self.dirty else ''}"
        return f"{self.device}, {self.threads} threads, torch {self.torch}, commit {commit}, {self.date[:10]}"


def conditions(device: torch.device | str = "cpu") -> Conditions:
    """Return what holds now. Call it once per run: everything measured together shares them."""
    device = torch.device(device)
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return Conditions(
        device=properties.name if properties else cpu_model(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        commit=_git("rev-parse", "--short=12", "HEAD") or "unknown",
        dirty=bool(_git("status", "--porcelain", "--", "tdpo_kernels", "bench/*.py")),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        system=f"{platform.system()} {platform.machine()}",
        cores=os.cpu_count(),
        memory_bytes=properties.total_memory if properties else memory,
        driver=f"CUDA {torch.version.cuda}" if properties else "",
        packages=", ".join(f"{name} {at}" for name in PACKAGES if (at := _version(name))),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def cpu_model() -> str:
    lines = INFO.read_text().splitlines() if INFO.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


class Neighbours:
    """Count the cores that other processes keep busy from now on. Many small operations suffer most from them."""

    def __init__(self) -> None:
        self.began, self.others = time.monotonic(), _others_seconds()

    def cores(self) -> float | None:
        """Return the mean number of them, None where the system does not tell."""
        if self.others is None:
            return None
        return max((_others_seconds() - self.others) / (time.monotonic() - self.began), 0.0)


def _others_seconds() -> float | None:
    """Return the CPU seconds of everything on the machine but this process, since boot."""
    if not STAT.exists():
        return None
    user, nice, system, _idle, _iowait, *interrupts_and_steal = map(int, STAT.read_text().splitlines()[0].split()[1:9])
    busy = user + nice + system + sum(interrupts_and_steal)
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
