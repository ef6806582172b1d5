"""Do the campaign's first stages: what it all runs on, `verify`, everybody's time and memory, and a profile."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import asdict, replace
from functools import cache, partial
from unittest.mock import patch

import torch
from torch import profiler

from tdpo_kernels import verify as verification
from tdpo_kernels.backends import BACKENDS, KERNELS, availability

from .. import measure, memory, rows
from ..conditions import Conditions, conditions
from ..problem import make_problem
from ..providers import FLOOR, PROVIDERS
from ..run import run
from ..shapes import Shape
from .campaign import Facts, Finding, Item, Settings

COMPILES = {name: len(kernels) for name, kernels in KERNELS.items()}
OURS = tuple(f"{backend}@{kept}" for kept in ("0", "4GiB", "1GiB") for backend in ("tiled", "fused"))
PASSES = {  # by value: what a trainer runs, then its parts. `compiled` is compiled for one of them
    "forward + backward": ({}, (*OURS, "eager", "compiled", "trl", "liger")),
    "forward": (dict(gradients=False), ("tiled@0", "fused@0", "eager", "trl")),
    "frozen head": (dict(trainable=False), ("tiled@0", "fused@0", "eager", "trl", "liger")),
}
SIZES = {"8b": (8192, 128256, 4096), "0.5b": (8192, 151936, 896)}  # T, V, D
DRY_SIZES = {"dry": (16, 203, 32)}
SECONDS = {"eager": 6.0, "compiled": 45.0, "trl": 10.0, "liger": 15.0}  # others: 4
DRIVER = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")


def env(settings: Settings) -> list[Item]:
    return [Item("machine and rates", partial(_machine, settings.device), 8.0)]


def _machine(device: torch.device) -> Facts:
    facts = asdict(conditions(device)) | {"backends": availability(device), "free": memory.available(device)}
    facts |= {"properties": str(torch.cuda.get_device_properties(device))} if device.type == "cuda" else {}
    rates = {dtype: ceiling(device, dtype) for dtype in ("bfloat16", "float16", "float32")}
    facts |= {f"{dtype} product, TFLOP/s": rate.flops / 1e12 for dtype, rate in rates.items()}
    return facts | {"copy, TB/s": rates["float32"].bytes / 1e12, "nvidia-smi after": ask_driver(*DRIVER)}


def ask_driver(*fields: str) -> dict[str, str]:
    """Return what ``nvidia-smi`` says of the first device; nothing where it is not there."""
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return dict(zip(fields, map(str.strip, done.stdout.split(",")), strict=False))


@cache
def ceiling(device: torch.device, dtype: str) -> measure.Ceiling:
    """Return what the machine gives, once per process; a dry run's is made up."""
    return measure.ceiling(dtype, device) if device.type == "cuda" else measure.Ceiling(1e11, 1e10)


def verify(settings: Settings) -> list[Item]:
    return [
        Item(f"{dtype} {name}", partial(_verify, settings, name, dtype), 8.0, 4 * COMPILES.get(name, 0), backend=name)
        for dtype in (("bf16", "fp32") if settings.dry else ("bf16", "fp16", "fp32"))
        for name in BACKENDS
        if not (settings.dry and (dtype, name) == ("bf16", "fused"))  # the interpreter multiplies raw bits
    ]


def _verify(settings: Settings, backend: str, dtype: str) -> Facts:
    names = ("one token",) if settings.dry else ()
    with patch.object(verification, "BACKENDS", {backend: BACKENDS[backend]}):
        lines = verification.verify(settings.device, names=names, dtypes=(dtype,))
    worst = max(lines, key=lambda line: line.error / line.allowed)
    said = f"{worst.problem} at {worst.budget}, {worst.quantity}: {worst.error:.1e} of {worst.allowed:.1e} allowed"
    if bad := sum(not line.passed for line in lines):
        raise Finding("failed", f"{bad} of {len(lines)} lines are over, the worst {said}")
    return {"lines": len(lines), "worst": said}


def headline(settings: Settings) -> list[Item]:
    """Time every contender beside its own floor, in order of value; each is saved as it ends."""
    return [
        Item(f"{shape.name}, {name}", partial(_measure, settings, shape, name), SECONDS.get(name, 4.0),
             2 * COMPILES.get(name.split("@")[0], 0), limit=150.0, ours="@" in name)
        for shape in _shapes(settings)
        for name in shape.contenders
    ]  # fmt: skip


def _shapes(settings: Settings) -> list[Shape]:
    rounds, dtype = (1, "float32") if settings.dry else (10, "bfloat16")
    return [
        Shape(f"{size}, {name}", T, V, D, "", who, rounds, (dtype,), device="cuda", **options)
        for size, (T, V, D) in (DRY_SIZES if settings.dry else SIZES).items()
        for name, (options, who) in PASSES.items()
    ]


def _measure(settings: Settings, shape: Shape, name: str) -> Facts:
    device, dtype, where = settings.device, shape.dtypes[0], _conditions(settings)
    with patch.object(memory, "ALONE", not settings.dry):
        found = run(shape, dtype, [FLOOR, name], shape.rounds, where, ceiling(device, dtype), lambda n: None, device)
    rows.append(settings.out / ("dry-rows.jsonl" if settings.dry else "rows.jsonl"), found)
    mine, facts = found[1], {"rows": [asdict(row) for row in found], "after": ask_driver("clocks.sm", "power.draw")}
    if mine.red or not mine.seconds:
        raise Finding("red" if mine.red else "skipped", mine.note or "", facts)
    return facts


def _conditions(settings: Settings) -> Conditions:
    """Return the conditions with the date of the campaign's first row, so that the report shows its rows together."""
    here = conditions(settings.device)
    if here.commit == "unknown":
        here = replace(here, commit=settings.commit or f"source-{settings.source}")
    before = (row.conditions for row in rows.load(settings.out / "rows.jsonl"))
    return next((c for c in before if replace(c, date="") == replace(here, date="")), here)


def profile(settings: Settings) -> list[Item]:
    return [
        Item(f"{shape.name}, {name}", partial(_profile, settings, shape, name), 6.0, backend=name.split("@")[0])
        for shape in _shapes(settings)[:: len(PASSES)]
        for name in OURS[:4]
    ]


def _profile(settings: Settings, shape: Shape, name: str) -> Facts:
    """Say where one step's time goes. The table is in the folder."""
    cuda, problem = settings.device.type == "cuda", make_problem(shape, shape.dtypes[0], settings.device)
    step = problem.step(PROVIDERS[name].make)
    step.backward(step.forward())
    with profiler.profile() as found:
        step.backward(step.forward())
        torch.cuda.synchronize() if cuda else None
    events, unit = found.key_averages(), "self_device_time_total" if cuda else "self_cpu_time_total"
    with (settings.out / "profile.txt").open("a") as file:
        table = events.table(sort_by=unit, row_limit=25, max_name_column_width=60)
        file.write(f"\n{shape.name}, {name}, source {settings.source}\n{table}\n")
    top = sorted(events, key=lambda event: -getattr(event, unit))[:5]
    return {f"{e.key[:48]} x{e.count}": f"{getattr(e, unit) / 1e3:.2f} ms" for e in top}
