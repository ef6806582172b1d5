"""List what to compile: cases, their configurations, and each as a launch specialises it. bf16 stands for fp16 too."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdpo_kernels.tuning import SMALL, TABLES, WIDTHS, Case, TileConfig, heuristic

from .binary import Build, Report, Target, report

if TYPE_CHECKING:
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

LARGE = 4096  # a hidden size that is not SMALL
HEAVY = dict(bias=True, softcap=True)
Head, Strides = namedtuple("Head", "bias scale softcap"), namedtuple("Strides", "h w g u")
OF_MATRICES = ("h", "w", "g", "u", "strides", "D", "E")


@dataclass(frozen=True)
class Job:
    """One binary: a case at a configuration, for a target, and what else there is to say."""

    case: Case
    config: TileConfig
    target: Target
    note: str = ""

    def __str__(self) -> str:
        flags = [name for name, value in asdict(self.case).items() if value is True and name != "aligned"]
        words = [self.case.kernel, self.case.product, *flags, *["unaligned"] * (not self.case.aligned)]
        return " ".join([*words, *[str(self.case.columns)] * (self.case.columns > 0), self.note]).strip()


def jobs(target: Target, tables: Path = TABLES) -> list[Job]:
    """Return every case at its heuristic, and the rows of the tables of the target's devices."""
    of_matrices = [Job(case, heuristic(case, target.name, LARGE), target) for case in _cases(target)]
    small = [replace(job, config=heuristic(job.case, target.name, SMALL), note="small D") for job in of_matrices]
    out = of_matrices + [job for job, large in zip(small, of_matrices, strict=True) if job.config != large.config]
    out += [Job(case, heuristic(case, target.name, LARGE), target) for case in _row_cases()]
    for table in (json.loads(path.read_text()) for path in sorted(tables.glob("*.json"))):
        rows = table["configs"] if table["arch"] == target.name else []
        out += [Job(Case(**row["case"]), TileConfig(**row["config"]), target, note=table["device"]) for row in rows]
    return out


def _cases(target: Target) -> Iterator[Case]:
    """Yield each product plain and at its heaviest, one head and two, aligned and not."""
    for kind in ("16bit", "ieee") if target.backend == "hip" else ("16bit", "tf32", "ieee"):
        stats, dz = Case("fused_stats", kind), Case("fused_dz", kind)
        heavy = replace(stats, **HEAVY, extras=True)
        yield from (replace(case, one_head=one) for case, one in product((stats, heavy), (False, True)))
        yield from (dz, replace(dz, **HEAVY), replace(dz, **HEAVY, aligned=False), replace(heavy, aligned=False))


def _row_cases() -> Iterator[Case]:
    for columns in WIDTHS:
        stats, dz = Case("tile_stats", columns=columns), Case("tile_dz", columns=columns)
        yield from (stats, replace(stats, **HEAVY, extras=True), dz, replace(dz, **HEAVY))


def core(target: Target) -> list[Job]:
    """Return what `make test` compiles: one case of each kernel."""
    names = "fused_stats 16bit", "fused_dz 16bit", "tile_stats 16bit bias softcap extras 2048", "tile_dz 16bit 2048"
    return [job for job in jobs(target) if str(job) in names]


def attempt(job: Job) -> Report:
    """Return what came out: in a process of its own that is all that can be told of a binary."""
    return report(build_of(job), job.target)


def build_of(job: Job) -> Build:
    """Return the kernel as a launch specialises it. Arguments are types, None or constants; all else is an integer."""
    case, config = job.case, job.config
    kind = "bf16" if case.product == "16bit" else "fp32"
    operand = "*" + kind
    h, w = (f"tensordesc<{kind}[{n}, {config.K}]>" if config.tma else operand for n in (config.R, config.C))
    head = Head(operand if case.bias else None, "fp32", "fp32" if case.softcap else None)
    u = None if case.one_head and case.kernel == "fused_stats" else w
    strides = Strides(*[None if config.tma else "i32"] * 4)
    arguments = dict(
        h=h, w=w, g=h, u=u, strides=strides, head=head, ref_head=head, labels="*i64",
        states="*fp32", label_logits="*fp32", kept="*fp32", row_values="*fp32", dz=operand,
        z_tile="*fp32", r_tile="*fp32", R=config.R, C=config.C, K=config.K, EXTRAS=case.extras,
        PRECISION="tf32" if case.product == "tf32" else "ieee",
    )  # fmt: skip
    wide = case.kernel.startswith("fused") and case.product != "ieee"
    return Build(str(job), _source(_kernel(case.kernel), arguments, case.aligned), config.options, wide)


def _kernel(name: str) -> JITFunction:
    from tdpo_kernels.device import dlogits, rows, stats

    return next(vars(module)[name] for module in (stats, dlogits, rows) if name in vars(module))


def _source(kernel: JITFunction, arguments: dict[str, Any], aligned: bool) -> ASTSource:
    """Return the kernel with its arguments' types, its constants by index path, and what is divisible by 16."""
    from triton.compiler import ASTSource

    signature, constants, divisible = {}, {}, []
    for i, parameter in enumerate(kernel.params):
        given = arguments.get(parameter.name, "i32")
        parts = {(i, j): part for j, part in enumerate(given)} if isinstance(given, tuple) else {(i,): given}
        fixed = {path: part for path, part in parts.items() if part is None or parameter.is_constexpr}
        types = ["constexpr" if path in fixed else part for path, part in parts.items()]
        signature[parameter.name] = type(given)(*types) if isinstance(given, tuple) else types[0]
        constants |= fixed
        if not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
            whole = [path for path, part in zip(parts, types, strict=True) if part.startswith(("*", "i"))]
            divisible += whole if aligned or parameter.name not in OF_MATRICES else []
    return ASTSource(kernel, signature, constants, {path: [["tt.divisibility", 16]] for path in divisible})
