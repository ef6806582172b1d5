"""Time and peak memory of everybody, interleaved with one library product of 2 T V D flops, as rows of `bench.rows`."""

from __future__ import annotations

import time
import traceback
from dataclasses import asdict, replace

import torch

from tdpo_kernels.tuning.table import Winner

from ... import tune
from ...conditions import Conditions, conditions
from ...gate import LIMITS
from ...measure import spread
from ...problem import make_problem
from ...providers.eager import tdpo2
from ...rows import Row
from ...shapes import Shape
from .. import tables
from ..contenders import BUDGETS, GEMM, SHAPES, Mode, loss_of, step_of
from ..device import Device, Step, ask_driver, bytes_of, gemm, lacks, runnable, triton_version
from ..plan import Facts, Failed, Item, Settings
from .tune import described

EAGER_COPIES = 8  # of fp32 [T, V], about what the published formula holds at its peak
ROWS, COLUMNS = 128, 5003  # of the cut that is compared with float64
ONLY_TRAINABLE = ("compiled",)  # compiling costs more than it tells about the other passes


def items(device: Device, settings: Settings) -> list[Item]:
    return [
        Item(f"{shape.name}, {mode.value}", lambda s=shape, m=mode: measure(device, settings, s, m), 45, 300)
        for shape in SHAPES
        if shape.name.startswith("dry") == settings.dry
        for mode in Mode
    ]


def measure(device: Device, settings: Settings, shape: Shape, mode: Mode) -> Facts:
    dtype = shape.dtypes[0]
    names = [name for name in shape.contenders if mode is Mode.TRAINABLE or name not in ONLY_TRAINABLE]
    found: dict[str, Facts] = {name: {} for name in names}
    problem = make_problem(shape, dtype, device.torch, mode is not Mode.FROZEN)
    steps: dict[str, Step] = {}
    for name in names:
        try:
            steps[name] = gemm(problem) if name == GEMM else _admitted(device, shape, mode, name, problem, found[name])
        except Failed as failure:
            found[name] |= {"red": True, "note": str(failure)}
        except NotHere as reason:
            found[name] |= {"note": f"skipped: {reason}"}
        except torch.cuda.OutOfMemoryError:
            found[name] |= {"note": "out of memory"}
        except Exception as error:  # a finding about this one, not the end of the others
            traceback.print_exc()
            found[name] |= {"red": "@" in name, "note": f"{type(error).__name__}: {error}".splitlines()[0]}
        problem.clear()
        device.clean()
    times = device.times(steps, shape.rounds, shape.calls, problem.clear)
    for name, values in times.items():
        ratios = [value / floor for value, floor in zip(values, times[GEMM], strict=True)]
        found[name] |= {"seconds": spread(values), "ratio": spread(ratios)}
    rows = [asdict(row) for row in _rows(shape, mode, dtype, found, _conditions(device, settings))]
    facts = {"rows": rows, "clocks": ask_driver("clocks.sm", "temperature.gpu", "power.draw")}
    if red := [f"{row['provider']}: {row['note']}" for row in rows if row["red"]]:
        raise Failed("; ".join(red), facts)
    return facts


class NotHere(Exception):
    """A contender that cannot run; the message says why."""


def _admitted(device: Device, shape: Shape, mode: Mode, name: str, problem, facts: Facts) -> Step:
    """A step that has run once and is right; its error and peak memory go into `facts`."""
    backend = name.split("@")[0]
    if why := runnable(device).get(backend, ""):
        raise NotHere(why)
    if lacks(device, backend, shape.dtypes[0]):
        raise NotHere("not in this dtype under the interpreter")
    if backend in ("eager", "compiled"):
        free, needs = device.free(), EAGER_COPIES * 4 * shape.T * shape.V
        if free is not None and needs > free:
            raise NotHere(f"needs about {needs / 1e9:.0f} GB, {free / 1e9:.0f} are free")
    loss = loss_of(name)
    if "@" in name:
        facts["error"] = gate(device, shape, mode, name)
    step = step_of(loss, problem, mode)
    step()
    problem.clear()
    if device.is_cuda or backend != "compiled":
        peak = device.peak(step)
        facts["peak_extra_bytes"] = peak - bytes_of(problem.hidden.grad, problem.weight.grad)
    return step


def gate(device: Device, shape: Shape, mode: Mode, name: str) -> float:
    """Nothing wrong is timed. The error against float64 on a cut of the shape: the loss's or a gradient's, the worst.

    Raises:
        Failed: it is too large.
    """
    dtype = shape.dtypes[0]
    cut = replace(shape, T=min(shape.T, ROWS), V=min(shape.V, COLUMNS))
    problem = make_problem(cut, dtype, device.torch, mode is not Mode.FROZEN)
    exact = problem.double()
    wanted = tdpo2(exact.hidden, exact.weight, exact.ref_hidden, exact.ref_weight, exact.labels)
    wanted.backward()
    pairs = [(step_of(loss_of(name), problem, mode)(), wanted.detach())]
    if mode is not Mode.FORWARD:
        pairs += [(problem.hidden.grad, exact.hidden.grad)]
    if mode is Mode.TRAINABLE:
        pairs += [(problem.weight.grad, exact.weight.grad)]
    error = max(float((x.double() - truth).norm() / truth.norm()) for x, truth in pairs)
    limit = LIMITS.get(dtype, LIMITS["bfloat16"])
    if not error <= limit:
        raise Failed(f"off by {error:.1e}, limit {limit:.0e}")
    return error


def _rows(shape: Shape, mode: Mode, dtype: str, found: dict[str, Facts], where: Conditions) -> list[Row]:
    same = dict(T=shape.T, V=shape.V, D=shape.D, dtype=dtype, rounds=shape.rounds, conditions=where)
    return [
        Row(f"{shape.name}, {mode.value}", **same, provider=name.split("@")[0],
            budget_bytes=BUDGETS[name.split("@")[1]] if "@" in name else None, **facts)
        for name, facts in found.items()
    ]  # fmt: skip


def _conditions(device: Device, settings: Settings) -> Conditions:
    name = device.name
    if device.is_cuda:
        driver = ask_driver("driver_version").get("driver_version", "unknown")
        name = f"{name} (driver {driver}, CUDA {torch.version.cuda}, Triton {triton_version()})"
    return replace(conditions(), device=name, commit=settings.commit, dirty=settings.dirty)


def finish(device: Device, settings: Settings, records: list[Facts]) -> None:
    """Which backend was faster at each size, into the table of `auto`."""
    winners = [w for r in records if (w := _winner(r["facts"]["rows"], device)) is not None]
    if winners:
        tune.write(described(device), winners=winners, folder=tables.folder(settings))
        tables.install(settings)


def _winner(rows: list[Facts], device: Device) -> Winner | None:
    first = rows[0]
    if not first["shape"].endswith(f", {Mode.TRAINABLE.value}"):
        return None
    ms = {r["provider"]: r["seconds"][0] * 1e3 for r in rows if r["budget_bytes"] == 0 and r["seconds"]}
    if set(ms) != {"fused", "tiled"}:
        return None
    itemsize = getattr(torch, first["dtype"]).itemsize
    versions = {"torch": torch.__version__, "triton": triton_version()}
    return Winner(itemsize, first["D"], first["V"], ms, time.strftime("%Y-%m-%d", time.gmtime()), versions)
