"""Measure every candidate of every kernel into one JSON for TDPO_KERNELS_TUNING.

A call and its backward are timed with one kernel's configuration forced, with nothing kept and with all logits kept:
the pair must share everything that bits depend on, so one configuration serves both. A candidate whose results are not
those of the present one is left out.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor

from tdpo_kernels import tuning

from .. import measure, rows
from ..gate import relative
from ..problem import Step
from ..providers import BUDGETS
from .campaign import Facts, Finding, Item, Settings
from .kernels import Inputs, cotangents, evaluate, packed
from .stages import SIZES

AGREE = 1e-2  # relative, by norm: rounding of 16-bit operands is far below, a wrong tile far above
KERNELS = {"fused_stats": "fused", "fused_dz": "fused", "tile_stats": "tiled", "tile_dz": "tiled"}
KEPT = ("0", "all")
TILES = ((128, 128), (128, 64), (64, 128), (64, 256), (128, 256))  # R x C of the kernels that multiply
LOCAL = threading.local()  # what a thread is told to choose, and whether it was asked
ROUNDS, WARM_ROWS = 3, 256  # timed; and rows of the call that compiles and is compared


def tune(settings: Settings) -> list[Item]:
    return [
        Item(f"{kernel} D={D}", partial(_tune, settings, kernel, T, V, D), 60.0, 40, backend, 300.0)
        for T, V, D in SIZES.values()
        for kernel, backend in KERNELS.items()
        if not settings.dry  # the interpreter has no configurations
    ]


def _tune(settings: Settings, kernel: str, T: int, V: int, D: int) -> Facts:
    with choosing() as asked:
        small = packed(settings, WARM_ROWS, V, D)
        wanted = outcome(kernel, None, small)
        if kernel not in asked:
            raise Finding("skipped", f"backend {KERNELS[kernel]} does not launch {kernel} here")
        case, device, base = asked[kernel]
        why = faults(kernel, candidates(case, base), small, wanted)
        sound = [config for config, bad in why.items() if not bad]
        if not sound:
            raise Finding("failed", f"no candidate is sound: {next(iter(why.values()))}")
        ms = _milliseconds(kernel, sound, packed(settings, T, V, D))
    best, *_ = ranked = sorted(ms, key=lambda config: sum(ms[config]))
    row = {"case": asdict(case), "D": D, "config": asdict(best), "ms": sum(ms[best])}
    write(settings, {"device": device.name, "arch": device.arch}, row)
    dropped = {str(config): bad for config, bad in why.items() if bad}
    return {"ms with nothing and all kept": {str(c): ms.get(c) for c in (*ranked[:3], base)}, "dropped": dropped}


def candidates(case: tuning.Case, base: tuning.TileConfig) -> list[tuning.TileConfig]:
    """Return the present configuration and its neighbours, each once. K stays: bits depend on it."""
    if case.kernel.startswith("fused"):
        tiles = [replace(base, R=R, C=C, warps=warps, registers=0) for R, C in TILES for warps in (4, 8)]
        tiles += [replace(tile, registers=128) for tile in tiles if tile.R * tile.C < 128 * 128]
        near = [replace(tile, stages=stages) for tile in tiles for stages in (3, 4, 5, 6)]
    else:
        near = [replace(base, R=R, warps=warps) for R in (1, 2, 4, 8) for warps in (2, 4, 8, 16)]
    return list(dict.fromkeys([base, *near]))


@contextmanager
def choosing() -> Iterator[dict[str, tuple]]:
    """Stand in for `tuning.choose` wherever it was imported to: collect what is asked for, and answer as forced."""
    real, asked = tuning.choose, {}

    def choose(case: tuning.Case, device: tuning.Device, width: int) -> tuning.TileConfig:
        kernel, config = getattr(LOCAL, "forced", ("", None))
        if kernel == case.kernel and config is not None:
            LOCAL.used = True
            return config
        config = real(case, device, width)
        asked.setdefault(case.kernel, (case, device, config))
        return config

    with ExitStack() as stack:
        ours = [module for name, module in list(sys.modules.items()) if name.startswith("tdpo_kernels")]
        for module in [m for m in ours if getattr(m, "choose", None) is real]:
            stack.enter_context(patch.object(module, "choose", choose))
        yield asked


def call(kernel: str, config: tuning.TileConfig | None, inputs: Inputs, kept: str) -> list[Tensor]:
    """Evaluate with a forced configuration. Autograd stays in this thread, which has been told what to choose."""
    LOCAL.forced = (kernel, config)
    with torch.autograd.set_multithreading_enabled(False):
        return evaluate(inputs, cotangents(inputs), KERNELS[kernel], BUDGETS[kept])


def outcome(kernel: str, config: tuning.TileConfig | None, inputs: Inputs) -> list[Tensor]:
    """Return all results, whatever is kept. Raise where nobody asked for the configuration: it was not used."""
    LOCAL.used = config is None
    found = [x for kept in KEPT for x in call(kernel, config, inputs, kept)]
    if not LOCAL.used:
        raise Finding("failed", f"{kernel} was launched without asking for its configuration")
    return found


def faults(kernel: str, every: list, inputs: Inputs, wanted: list[Tensor]) -> dict[tuning.TileConfig, str]:
    """Return why a candidate does not compile, run or agree; empty if it does. They compile beside one another."""

    def fault(config: tuning.TileConfig) -> str:
        try:
            found = outcome(kernel, config, inputs)
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0][:200]
        off = max(relative(x, y) for x, y in zip(found, wanted, strict=True))
        return "" if off <= AGREE else f"results are off by {off:.1e}"

    with one_parser(), ThreadPoolExecutor(8) as pool:
        return dict(zip(every, pool.map(fault, every), strict=True))


def one_parser() -> AbstractContextManager:
    """Let one thread parse a kernel at a time: before Python 3.13 threads share the parser's recursion depth."""
    if sys.version_info >= (3, 13):
        return nullcontext()
    from triton.compiler import ASTSource

    parse, lock = ASTSource.make_ir, threading.Lock()

    def locked(*arguments, **options):
        with lock:
            return parse(*arguments, **options)

    return patch.object(ASTSource, "make_ir", locked)


def _milliseconds(kernel: str, configs: list, inputs: Inputs) -> dict:
    """Return two medians of each configuration, with nothing and with everything kept."""
    steps = {
        (config, kept): Step(partial(call, kernel, config, inputs, kept), lambda out: None)
        for config in configs
        for kept in KEPT
    }
    found = measure.times(steps, lambda: None, inputs[0].device, ROUNDS, 1, lambda: None)
    ms = {key: 1e3 * median(sample.both for sample in samples) for key, samples in found.items()}
    return {config: [ms[config, kept] for kept in KEPT] for config in configs}


def write(settings: Settings, device: Facts, row: Facts) -> None:
    """Put a row, and which backend the headline found to be faster, into the folder's tuning.json."""
    path = settings.out / "tuning.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    others = [old for old in table.get("configs", []) if (old["case"], old["D"]) != (row["case"], row["D"])]
    table = device | {"configs": [*others, row], "winners": winners(rows.load(settings.out / "rows.jsonl"))}
    path.write_text(json.dumps(table, indent=1) + "\n")


def winners(measured: list[rows.Row]) -> list[Facts]:
    """Return the milliseconds of forward and backward with nothing kept, where both backends were timed."""
    found: dict[tuple, Facts] = {}
    for row in measured:
        if row.shape.endswith("forward + backward") and row.budget_bytes == 0 and row.seconds and not row.red:
            size = (getattr(torch, row.dtype).itemsize, row.D, row.V)
            found.setdefault(size, {})[row.provider] = 1e3 * row.seconds[0]
    return [dict(zip(("itemsize", "D", "V"), size, strict=True), ms=ms) for size, ms in found.items() if len(ms) == 2]
