"""Where a step's time goes: one step of each backend under torch's profiler."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ...problem import make_problem
from ..contenders import SHAPES, Mode, loss_of, step_of
from ..device import Device, lacks, runnable
from ..plan import Facts, Item, Settings, Skipped

ROWS = 25


def items(device: Device, settings: Settings) -> list[Item]:
    shape = next(s for s in SHAPES if s.name.startswith("dry") == settings.dry)
    dtype = "bfloat16" if device.is_cuda else "float16"
    return [
        Item(f"{backend}@{budget}", lambda b=f"{backend}@{budget}": profiled(device, settings, b, shape, dtype), 25)
        for backend in runnable(device)
        if backend != "naive" and not lacks(device, backend, dtype)
        for budget in ("0", "all")
    ]


def profiled(device: Device, settings: Settings, name: str, shape, dtype: str) -> Facts:
    if why := runnable(device)[name.split("@")[0]]:
        raise Skipped(why)
    problem = make_problem(shape, dtype, device.torch)
    step = step_of(loss_of(name), problem, Mode.TRAINABLE)
    step()
    problem.clear()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.is_cuda else [])]
    with profile(activities=activities) as found:
        step()
        if device.is_cuda:
            torch.cuda.synchronize()
    by = "self_cuda_time_total" if device.is_cuda else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=60)
    with Path(settings.out, "profile.txt").open("a") as file:
        file.write(f"\n{'DRY RUN ' if settings.dry else ''}{name}, {shape.name}, {dtype}\n{table}\n")
    return {"shape": shape.name, "dtype": dtype, "top": _top(found, by)}


def _top(found: profile, by: str) -> list[list]:
    """Name, calls and microseconds of what takes longest."""
    attribute = by.replace("cuda", "device")
    rows = [(event.key, event.count, getattr(event, attribute, 0.0)) for event in found.key_averages()]
    return [list(row) for row in sorted(rows, key=lambda row: -row[2])[:8]]
