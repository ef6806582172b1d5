"""Every candidate of every kernel, interleaved with one library product of 2 T V D flops; the winners become the table.

A kernel is timed through its backend's forward or backward, with its configuration forced and no gradient wanted, so
that nothing but the walk is around it. A candidate whose results are not those of the present one is left out.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median

import torch
from torch import Tensor

from tdpo_kernels import tuning
from tdpo_kernels.backends import BACKENDS
from tdpo_kernels.tuning import Case, TileConfig
from tdpo_kernels.tuning import Device as Described
from tdpo_kernels.tuning.config import product_of
from tdpo_kernels.tuning.heuristic import widths
from tdpo_kernels.tuning.table import Measured
from tdpo_kernels.types import Forward, Inputs, LMHead, Model, Needs, Rows

from ... import tune
from ...problem import make_problem
from ...shapes import Shape
from .. import tables
from ..candidates import candidates
from ..contenders import EVERYTHING, GEMM
from ..device import Device, Step, gemm, runnable, triton_version
from ..plan import Facts, Failed, Item, Settings, Skipped

AGREE = 1e-2  # relative, by norm: rounding of 16-bit operands is far below, a wrong tile far above
NOTHING, HIDDEN, EVERY = Needs(False, False, False), Needs(True, False, False), Needs(True, True, False)


@dataclass(frozen=True)
class Target:
    """A kernel, and the pass of a backend that launches it."""

    kernel: str
    backend: str
    backward: bool = False
    staged: bool = False
    one_head: bool = False

    def __str__(self) -> str:
        return " ".join([self.kernel, *["staged"] * self.staged, *["one head"] * self.one_head])


TARGETS = (
    Target("fused_stats", "fused"),
    Target("fused_stats", "fused", staged=True),
    Target("fused_stats", "fused", one_head=True),
    Target("fused_dz", "fused", backward=True),
    Target("staged_dz", "fused", backward=True, staged=True),
    Target("tile_stats", "tiled"),
    Target("tile_stats", "tiled", staged=True),
    Target("tile_dz", "tiled", backward=True),
)
SHAPES = (
    Shape("8b", 8192, 128256, 4096, "", (), 5, ("bfloat16",)),
    Shape("0.5b", 8192, 151936, 896, "", (), 5, ("bfloat16",)),
)
DRY_SHAPES = (Shape("dry", 32, 300, 32, "", (), 1, ("float16",)),)
WARM_ROWS = 1024  # of the call that compiles and is compared


def items(device: Device, settings: Settings) -> list[Item]:
    return [
        Item(f"{target} {shape.name}", lambda t=target, s=shape: measure(device, settings, t, s), 40, 400)
        for shape in (DRY_SHAPES if settings.dry else SHAPES)
        for target in TARGETS
    ]


def measure(device: Device, settings: Settings, target: Target, shape: Shape) -> Facts:
    if target.backend not in BACKENDS or runnable(device)[target.backend]:
        raise Skipped(runnable(device).get(target.backend, f"there is no backend {target.backend}"))
    with Chooser() as chooser:
        small = _inputs(device, target, Shape("", min(shape.T, WARM_ROWS), shape.V, shape.D, "", (), 1, shape.dtypes))
        wanted = _outcome(target, small)
        if target.kernel not in chooser.asked:
            raise Skipped(f"backend {target.backend} does not launch {target.kernel} here")
        case = chooser.asked[target.kernel]
        every = candidates(case, described(device), few=settings.dry)
        sound, dropped = _sound(device, chooser, target, small, wanted, every)
        if not sound:
            raise Failed("no candidate is sound", {"case": asdict(case), "dropped": dropped})
        times = _times(device, chooser, target, shape, sound)
    floor = times.pop(GEMM)
    found = [
        {"config": asdict(config), "name": str(config), "ms": 1e3 * median(times[str(config)]),
         "ratio": median(x / y for x, y in zip(times[str(config)], floor, strict=True))}
        for config in sound
    ]  # fmt: skip
    return {
        "case": asdict(case), "D": shape.D, "gemm_ms": 1e3 * median(floor), "dropped": dropped,
        "results": sorted(found, key=lambda row: row["ms"]), "present": str(sound[0]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": {"torch": torch.__version__, "triton": triton_version()},
    }  # fmt: skip


class Chooser:
    """Stands in for `tuning.choose` wherever that was imported to: notes what is asked for, and forces an answer."""

    def __init__(self) -> None:
        self.real, self.asked, self.local = tuning.choose, {}, threading.local()

    def __enter__(self) -> Chooser:
        modules = [m for name, m in list(sys.modules.items()) if name.startswith("tdpo_kernels")]
        self.places = [m for m in modules if getattr(m, "choose", None) is self.real]
        for module in self.places:
            module.choose = self
        return self

    def __exit__(self, *_: object) -> None:
        for module in self.places:
            module.choose = self.real

    def __call__(self, kernel: str, device: Described, itemsize: int, **options) -> TileConfig:
        self.asked.setdefault(kernel, _case(kernel, itemsize, **options))
        forced = getattr(self.local, "forced", None)
        if forced is None or forced[0] != kernel:
            return self.real(kernel, device, itemsize, **options)
        self.local.used = True
        return forced[1]

    @contextmanager
    def force(self, kernel: str, config: TileConfig) -> Iterator[None]:
        """In this thread.

        Raises:
            Failed: nobody asked.
        """
        self.local.forced, self.local.used = (kernel, config), False
        try:
            yield
        finally:
            self.local.forced = None
        if not self.local.used:
            raise Failed(f"{kernel} was launched without asking for its configuration")


def _case(kernel: str, itemsize: int, *, ieee: bool = False, **options) -> Case:
    """As `tuning.choose` makes it."""
    flags = {name: value for name, value in options.items() if name in Case.__dataclass_fields__}
    return Case(kernel, product_of(itemsize, ieee), **flags).relevant().with_columns(widths(kernel))


def described(device: Device) -> Described:
    """As the launcher sees it."""
    from tdpo_kernels.backends import launch

    return launch.device_of(device.torch)


def _inputs(device: Device, target: Target, shape: Shape) -> Inputs:
    problem = make_problem(shape, shape.dtypes[0], device.torch, trainable=False)
    hidden, ref_hidden = problem.hidden.detach().flatten(0, 1), problem.ref_hidden.flatten(0, 1)
    ref_weight = problem.weight if target.one_head else problem.ref_weight
    sides = [Model(h, LMHead(w), h.dtype) for h, w in ((hidden, problem.weight), (ref_hidden, ref_weight))]
    return Inputs(*sides, Rows(None, None, problem.labels.flatten()), EVERYTHING if target.staged else 0)


def _cotangents(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Independent of each other: no product is spared."""
    T, device = inputs.rows.count, inputs.policy.hidden.device
    g = torch.randn(2, T, generator=torch.Generator(device).manual_seed(1), device=device)
    return g[0], g[1]


def _outcome(target: Target, inputs: Inputs) -> list[Tensor]:
    """Statistics and gradients of one call."""
    backend = BACKENDS[target.backend]
    out = backend.forward(inputs, EVERY if target.staged or target.backward else NOTHING)
    found = [out.logp_T, out.ref_logp_T, out.kl_T]
    if target.staged or target.backward:
        grads = backend.backward(inputs, EVERY, out.saved, *_cotangents(inputs))
        found += [grads.hidden, grads.weight]
    return found


def _sound(
    device: Device, chooser: Chooser, target: Target, inputs: Inputs, wanted: list[Tensor], every: list[TileConfig]
) -> tuple[list[TileConfig], dict[str, str]]:
    """The candidates that compile, run and agree; of the others, why not. Compiled beside one another."""

    def fault(config: TileConfig) -> str:
        try:
            with chooser.force(target.kernel, config):
                found = _outcome(target, inputs)
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0][:200]
        errors = [_apart(x, y) for x, y in zip(found, wanted, strict=True)]
        return "" if all(e <= AGREE for e in errors) else f"results are off by {max(errors):.1e}"

    with ThreadPoolExecutor(8 if device.is_cuda else 1) as pool:
        faults = list(pool.map(fault, every))
    sound = [config for config, why in zip(every, faults, strict=True) if not why]
    return sound, {str(config): why for config, why in zip(every, faults, strict=True) if why}


def _apart(x: Tensor, y: Tensor) -> float:
    """Infinite where anything is not a number."""
    error = float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def _times(
    device: Device, chooser: Chooser, target: Target, shape: Shape, configs: list[TileConfig]
) -> dict[str, list[float]]:
    inputs, backend = _inputs(device, target, shape), BACKENDS[target.backend]
    cotangents = _cotangents(inputs)
    out: Forward | None = backend.forward(inputs, HIDDEN) if target.backward else None

    def step(config: TileConfig) -> Step:
        def run() -> None:
            with chooser.force(target.kernel, config):
                if out is None:
                    backend.forward(inputs, HIDDEN if target.staged else NOTHING)
                else:
                    backend.backward(inputs, NOTHING, out.saved, *cotangents)

        return run

    problem = make_problem(shape, shape.dtypes[0], device.torch, trainable=False)
    steps = {GEMM: gemm(problem)} | {str(config): step(config) for config in configs}
    return device.times(steps, shape.rounds, 1, lambda: None)


def finish(device: Device, settings: Settings, records: list[Facts]) -> None:
    """Writes the table, from all that is known."""
    rows = [_measured(record["facts"]) for record in records]
    if rows:
        tune.write(described(device), rows, folder=tables.folder(settings))
        tables.install(settings)


def _measured(facts: Facts) -> Measured:
    best, *rest = facts["results"]
    second = (TileConfig(**rest[0]["config"]), rest[0]["ms"]) if rest else None
    case, config = Case(**facts["case"]), TileConfig(**best["config"])
    return Measured(case, facts["D"], config, best["ms"], second, facts["date"], facts["versions"])
