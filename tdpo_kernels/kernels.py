"""``python -m tdpo_kernels kernels``: every configuration that is shipped, compiled without a GPU and looked through.

Needs triton but no torch. fp16 compiles like bf16, so bf16 stands for both.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import offline
from .offline import TARGETS, Build, Report, Target, compile_for
from .tuning.config import Case, TileConfig
from .tuning.heuristic import heuristic, in_turns, keeps_bits, widths
from .tuning.roofline import H200, SHAPES, estimate
from .tuning.table import TABLES, parse

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

PRODUCTS = {name: ("16bit", "ieee") if name == "gfx942" else ("16bit", "tf32", "ieee") for name in TARGETS}


@dataclass(frozen=True)
class Job:
    """One thing to compile: a case, the configuration shipped for it, and the target.

    Args:
        needs: which products `tile_dz` is given.
        origin: ``"heuristic"``, or the table it is from.
    """

    case: Case
    config: TileConfig
    target: Target
    needs: tuple[bool, bool] = (True, True)
    origin: str = "heuristic"

    @property
    def name(self) -> str:
        return f"{self.case}{' p' if not self.needs[1] else ' q' if not self.needs[0] else ''}"


def cases(products: Iterable[str]) -> Iterator[Case]:
    """What the heuristics are compiled for: each one plain and at its heaviest, with biases, softcaps and extras."""
    none, head = {}, dict(bias=True, softcap=True)
    every = dict(head, extras=True)
    for kind in products:
        stats = [dict(one_head=one, staged=staged) for one, staged in product((False, True), repeat=2)]
        for more in (none, every):
            yield from (Case("fused_stats", kind, **flags, **more) for flags in stats)
        for more in (none, head) if kind != "ieee" else (head,):
            yield Case("fused_dz", kind, **more)
        yield from (Case("fused_stats", kind, **flags, **every, aligned=False) for flags in stats)
        yield Case("fused_dz", kind, **head, aligned=False)
    for staged, name in product((False, True), every):
        yield Case("fused_stats", "16bit", staged=staged, **{name: True})
    yield from (Case("fused_dz", "16bit", **{name: True}) for name in head)
    for kind, heavy in (("16bit", False), ("ieee", True)):
        bias = dict(bias=heavy, softcap=heavy)
        for columns in widths("tile_stats"):
            for staged in (False, True):
                yield Case("tile_stats", kind, staged=staged, extras=heavy, columns=columns, **bias)
            yield Case("tile_dz", kind, columns=columns, **bias)
        yield from (Case("staged_dz", kind, softcap=heavy, columns=columns) for columns in widths("staged_dz"))
    yield from (Case("merge_states", "ieee", extras=extras) for extras in (False, True))


def shipped(target: Target, tables: Path = TABLES) -> list[Job]:
    """The heuristics for `target`, persistent where a device may be found to like that, and what tables of devices of
    its architecture say."""
    jobs = [Job(case, heuristic(case, target.name), target) for case in cases(PRODUCTS[target.name])]
    plain = [job for job in jobs if _may_take_turns(job.case)]
    jobs += [replace(job, config=config) for job in plain for config in in_turns(job.config, target.name)]
    for columns, needs in product(widths("tile_dz")[:1], ((True, False), (False, True))):
        case = Case("tile_dz", "16bit", columns=columns)
        jobs.append(Job(case, heuristic(case, target.name), target, needs))
    for path in sorted(tables.glob("*.json")):
        table = parse(path.read_text(), str(path))
        if table.arch == target.name:
            jobs += [Job(row.case, row.config, target, origin=path.stem) for row in table.configs]
    return jobs


def _may_take_turns(case: Case) -> bool:
    bare = case.aligned and not (case.bias or case.softcap or case.extras)
    return case.kernel in ("fused_stats", "fused_dz") and case.product == "16bit" and bare


def core(target: Target) -> list[Job]:
    """What `make test` compiles: of each kernel one configuration, on sm_90 also what is staged."""
    stats, dz, row = Case("fused_stats", "16bit"), Case("fused_dz", "16bit"), dict(product="16bit", columns=4096)
    wanted = {
        "sm_80": (dz, Case("tile_stats", **row)),
        "sm_90": (stats, replace(stats, staged=True), dz),
        "sm_100": (dz, Case("tile_dz", **row)),
        "gfx942": (stats, Case("staged_dz", "16bit", columns=128), Case("merge_states", "ieee")),
    }
    return [Job(case, heuristic(case, target.name), target) for case in wanted[target.name]]


# --- one build --------------------------------------------------------------------------------------------------------

FLOATS = ("scale", "softcap", "ref_scale", "ref_softcap", "F")
POINTERS = {"labels": "*i64"} | dict.fromkeys(
    ("states", "row_values", "coefficients", "weights", "out", "z_tile", "r_tile"), "*fp32"
)
MATRICES = ("h", "w", "g", "u")
OF_MATRICES = (*MATRICES, "D", "E", *(f"stride_{name}" for name in MATRICES))


def build_of(job: Job) -> Build:
    """As a launch specialises it: None stands for what is absent."""
    case, config, kernel = job.case, job.config, _kernel(job.case.kernel)
    constexprs = {name: value for name, value in _constexprs(job).items() if name in kernel.arg_names}
    signature = {name: _type(name, job) for name in kernel.arg_names if name not in constexprs}
    products = case.kernel in ("fused_stats", "fused_dz")
    return Build(
        name=job.name,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        options=config.options,
        divisible=tuple(name for name, type_ in signature.items() if _divisible(name, type_, job)),
        stack_allowance=config.stack,
        wants_wgmma=products and case.product != "ieee",
    )


def _kernel(name: str) -> JITFunction:
    from .device import dlogits, merge, rows, stats

    return next(getattr(module, name) for module in (stats, dlogits, rows, merge) if name in vars(module))


def _constexprs(job: Job) -> dict[str, Any]:
    case, config = job.case, job.config
    given = dict(
        R=config.R, C=config.C, K=config.K, TMA=config.tma, PRECISION="tf32" if case.product == "tf32" else "ieee",
        ONE_HEAD=case.one_head, STAGE=case.staged, EXTRAS=case.extras, HAS_BIAS=case.bias, HAS_REF_BIAS=case.bias,
        HAS_SOFTCAP=case.softcap, HAS_REF_SOFTCAP=case.softcap, NEEDS_Z=job.needs[0], NEEDS_R=job.needs[1],
        PERSISTENT=config.persistent,
    )  # fmt: skip
    absent = () if case.bias else ("bias", "ref_bias")
    absent += tuple(name for name, needed in zip(("z_tile", "r_tile"), job.needs, strict=True) if not needed)
    if case.kernel in ("fused_stats", "tile_stats") and not case.staged:
        absent += ("staged",)
    return given | dict.fromkeys(absent)


def _type(name: str, job: Job) -> str:
    case, config = job.case, job.config
    operand = "bf16" if case.product == "16bit" else "fp32"
    if name in MATRICES and config.tma:
        return f"tensordesc<{operand}[{config.R if name in ('h', 'g') else config.C}, {config.K}]>"
    if name in (*MATRICES, "bias", "ref_bias", "dz", "staged"):
        return f"*{operand}"
    return POINTERS.get(name) or ("fp32" if name in FLOATS else "i32")


def _divisible(name: str, type_: str, job: Job) -> bool:
    """What a launch would not look at is whatever it is; all others are taken as multiples of 16."""
    (it,) = (parameter for parameter in _kernel(job.case.kernel).params if parameter.name == name)
    whole = type_.startswith(("*", "i")) and not (it.do_not_specialize or it.do_not_specialize_on_alignment)
    return whole and (job.case.aligned or name not in OF_MATRICES)


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tdpo_kernels kernels", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--core", action="store_true", help="only the few that `make test` compiles")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all of them; can be repeated")
    parser.add_argument(
        "--roofline", action="store_true", help="estimates of what the sm_90 ones could reach on an H200"
    )
    parser.add_argument("--jobs", type=int, default=2, help="compiled at once; default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="printed there instead, with the command on top")


def run(arguments: argparse.Namespace) -> int:
    if not arguments.out:
        return _run(arguments)
    with arguments.out.open("w") as file, redirect_stdout(file):
        print(f"{_command(arguments)}\n\n{WHAT_IT_IS}\n")
        return _run(arguments)


WHAT_IT_IS = """\
Compiled, not run: no GPU was there. Registers (a thread), stack (bytes a thread), shared memory (bytes) and counts of
instructions are read off the binaries; s is what compiling took. Times in the table of estimates are estimates, not
measurements: counted flops and bytes over rates that are stated there."""


def _command(arguments: argparse.Namespace) -> str:
    flags = [f"--{name}" for name in ("core", "roofline") if getattr(arguments, name)]
    targets = [f"--target {name}" for name in arguments.target or ()]
    return " ".join(["python -m tdpo_kernels kernels", *targets, *flags, f"--out {arguments.out}"])


def _run(arguments: argparse.Namespace) -> int:
    targets = [TARGETS[name] for name in arguments.target or TARGETS]
    if reason := next(filter(None, map(offline.unavailable, targets)), ""):
        print(f"nothing can be compiled here: {reason}")
        return 2
    jobs = [job for target in targets for job in (core if arguments.core else shipped)(target)]
    return report(jobs, workers=arguments.jobs, roofline=arguments.roofline)


def report(jobs: list[Job], *, workers: int = 2, roofline: bool = False) -> int:
    """Prints a line per job as it is done; 1 if any has a fault, else 0.

    Processes, not threads: before Python 3.13 two threads in `ast.parse`, where Triton begins, can fail each other.
    """
    import triton

    print(f"triton {triton.__version__}, {len(jobs)} builds; loop and around count local-memory instructions\n")
    print(f"{'':8}{'case':56}{'configuration':27}{offline.HEADER[32:]}", flush=True)
    failed, reports = 0, []
    with ProcessPoolExecutor(max(workers, 1), get_context("spawn")) as pool:
        for i, (job, made) in enumerate(zip(jobs, pool.map(_attempt, jobs), strict=True), 1):
            lines, sound = _lines(job, made)
            print(f"{i:3}/{len(jobs):<4}{lines}", flush=True)
            failed += not sound
            reports += [(job, made)] if isinstance(made, Report) else []
    if roofline:
        print(f"\n{roofline_table(reports)}")
    print(f"\n{len(jobs) - failed} sound, {failed} failed")
    return 1 if failed else 0


def _attempt(job: Job) -> Report | str:
    """What came out, less the kernel itself, which no pickle holds; or why nothing did."""
    if not keeps_bits(job.case, job.config, job.target.name):
        return f"{job.origin}: staging would change bits of the statistics; no launch uses this row"
    try:
        made = compile_for(build_of(job), job.target)
    except (RuntimeError, TypeError, ValueError) as error:
        return " ".join(str(error).split())
    return replace(made, build=replace(made.build, kernel=None))


def _lines(job: Job, made: Report | str) -> tuple[str, bool]:
    what = f"{job.name:56}{str(job.config):27}"
    if isinstance(made, str):
        return f"{what}{job.target.name}\n  FAILED: {made}", False
    _, numbers, *faults = offline.table([replace(made, build=replace(made.build, name=""))]).splitlines()
    return "\n".join([what + numbers[32:], *faults]), not faults


def roofline_table(reports: list[tuple[Job, Report]]) -> str:
    """Estimates, not measurements: `tuning/roofline.py`."""
    products = ("fused_stats", "fused_dz")
    lines = [
        f"estimates on {H200.name}, not measured: {H200.flops['16bit'] / 1e12:.0f} TFLOP/s of bf16 and "
        f"{H200.memory / 1e12:.1f} TB/s of memory (data sheet), {H200.cache / 1e12:.1f} TB/s of L2 (assumed)",
        f"{'case':56}{'configuration':27}{'T x D x V':>20}{'a unit':>8}{'flops':>9}{'L2':>9}{'HBM':>9}   bound",
    ]
    for job, made in reports:
        if job.case.kernel not in products or job.target.name != "sm_90":
            continue
        for shape in SHAPES:
            e = estimate(job.case, job.config, made.registers, made.shared, shape)
            times = "".join(f"{1e3 * seconds:6.1f} ms" for seconds in (e.compute, e.cache, e.memory))
            sizes = f"{shape.T} x {shape.D} x {shape.V}"
            lines.append(f"{job.name:56}{str(job.config):27}{sizes:>20}{e.programs:8}{times}   {e.bound}")
    return "\n".join(lines)
