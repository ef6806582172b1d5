"""``python -m bench`` measures: speed and memory per shape, accuracy against drift, whole training steps. Rows are
appended as they come; ``--resume`` goes on after an interruption. ``python -m bench report`` turns them into tables
and figures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from . import drift, roofline, rows, step
from .conditions import Conditions, conditions
from .providers import FLOOR, PROVIDERS
from .report.tables import markdown, tables
from .rows import Row
from .run import run
from .shapes import QUICK, SHAPES, Shape

ROUNDS = 3  # of quick runs and of whole steps
PARTS = ("speed", "accuracy", "step")
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """Something measured together: its shapes' names with who is measured at each, how many ticks it takes, and how."""

    name: str
    dtype: str
    who: dict[str, list[str]]
    ticks: int
    run: Callable[[Conditions, Tick], list[Row]]

    @property
    def keys(self) -> set[tuple]:
        """Return `Row.key` of the rows to come."""
        rows = [(shape, name) for shape, names in self.who.items() for name in names]
        return {(shape, self.dtype, name.split("@")[0], PROVIDERS[name].budget) for shape, name in rows}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench", description=__doc__)
    p.add_argument("command", nargs="?", choices=("run", "report"), default="run")
    families = dict.fromkeys(shape.family for shape in SHAPES.values())
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    p.add_argument("--shapes", type=_names, help=f"names or families ({', '.join(families)}); speed only")
    p.add_argument("--providers", type=_names, help="of those a shape lists, or 'ours' for all; floor always runs")
    p.add_argument("--dtypes", type=_names, help="of those a shape lists; default: all of them")
    p.add_argument("--rounds", type=int, choices=range(1, 1000), metavar="N", help="default: each shape's own")
    p.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} only, {ROUNDS} rounds; few drifts")
    p.add_argument("--resume", action="store_true", help="leave out what this commit has measured in this environment")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    p.add_argument("--out", type=Path, help="the JSON Lines file to append to, or to report from")
    p.add_argument("--to", type=Path, default=rows.FOLDER / "report", help="the folder of the report")
    p.add_argument("--no-save", action="store_true", help="print the table only")
    return p


def main(arguments: list[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(arguments)
    if options.command == "report":
        return _report(options)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        p.error("--device: got 'cuda', but torch sees no CUDA device")
    try:
        jobs = _plan(options, device)
    except ValueError as error:
        p.error(str(error))
    where = conditions(device)
    out = options.out or rows.file_of(where.device)
    jobs = _left(jobs, out, where) if options.resume else jobs
    measured = _measure(jobs, where, None if options.no_save else out)
    print(markdown(tables(measured)))
    return int(any(row.red for row in measured))


def _report(options: argparse.Namespace) -> int:
    from .report.build import write  # needs matplotlib, which measuring does not

    files = [options.out] if options.out else sorted(rows.FOLDER.glob("*.jsonl"))
    for path in write({path.stem: rows.together(rows.load(path)) for path in files}, options.to):
        print(path)
    return 0


def _plan(options: argparse.Namespace, device: torch.device) -> list[Job]:
    parts = options.parts
    families = {name.split("@")[0] for name in PROVIDERS}
    wanted = _known(options.providers or list(PROVIDERS), {*PROVIDERS, *families}, "--providers")
    dtypes = _known(options.dtypes or [], {"float32", "bfloat16"}, "--dtypes")

    def chosen(names: Iterable[str]) -> list[str]:
        return [n for n in names if n == FLOOR or n in wanted or n.split("@")[0] in wanted]

    plans = {"speed": _speed, "accuracy": _accuracy, "step": _steps}
    plans = {part: plan for part, plan in plans.items() if part in parts and (part == "speed" or not options.shapes)}
    jobs = [job for plan in plans.values() for job in plan(options, device, chosen)]
    jobs = [job for job in jobs if not dtypes or job.dtype in dtypes or job.name.startswith("step ")]
    if not jobs:
        raise ValueError("nothing to measure: no chosen part has a chosen shape, provider and dtype")
    return jobs


def _speed(options: argparse.Namespace, device: torch.device, chosen: Callable) -> list[Job]:
    ceiling = cache(lambda dtype: roofline.measure(dtype, device))

    def job(shape: Shape, dtype: str, names: list[str]) -> Job:
        rounds = options.rounds or (ROUNDS if options.quick else shape.rounds)
        return Job(f"{shape.name} {dtype}", dtype, {shape.name: names}, len(names) * (rounds + 1),
                   lambda at, tick: run(shape, dtype, names, rounds, at, ceiling(dtype), tick, device))  # fmt: skip

    asked = [(shape, chosen(shape.contenders)) for shape in _shapes(options, device)]
    return [job(shape, dtype, names) for shape, names in asked if names != [FLOOR] for dtype in shape.dtypes]


def _shapes(options: argparse.Namespace, device: torch.device) -> list[Shape]:
    """Return shapes by name or family; unless asked for, those of this device."""
    if options.shapes is None:
        names = QUICK if options.quick else [s.name for s in SHAPES.values() if s.device == device.type]
        return [SHAPES[name] for name in names]
    wanted = _known(options.shapes, {*SHAPES, *(shape.family for shape in SHAPES.values())}, "--shapes")
    here = ("", device.type)
    return [s for s in SHAPES.values() if s.name in wanted or s.family in wanted and s.device in here]


def _accuracy(options: argparse.Namespace, device: torch.device, chosen: Callable) -> list[Job]:
    targets, names = drift.QUICK if options.quick else drift.TARGETS, chosen(drift.WHO)
    absent = drift.absent(names, device)
    who = {drift.name_of(target): [name for name in names if name not in absent] for target in targets}

    def job(dtype: str) -> Job:
        return Job(f"drift {dtype}", dtype, who | {drift.SHAPE.name: list(absent)}, len(names) * len(targets),
                   lambda where, tick: drift.study(dtype, names, targets, where, tick, device))  # fmt: skip

    return [job(dtype) for dtype in drift.DTYPES] if names else []


def _steps(options: argparse.Namespace, device: torch.device, chosen: Callable) -> list[Job]:
    rounds, names = options.rounds or ROUNDS, chosen(step.WHO)

    def job(size: str) -> Job:
        absent = step.absent(size, names, device)
        who = {step.shape_of(size).name: names, step.context_name(size): [n for n in names if n not in absent]}
        return Job(f"step {size}", step.SIZES[size].dtype, who, sum(map(len, who.values())),
                   lambda where, tick: step.study(size, names, rounds, where, tick, device))  # fmt: skip

    sizes = step.QUICK if options.quick else [n for n, size in step.SIZES.items() if size.device == device.type]
    return [job(size) for size in sizes] if names else []


def _left(jobs: list[Job], out: Path, where: Conditions) -> list[Job]:
    """Return the jobs of which a row is missing, or known only from another commit, environment or changed checkout."""
    same = [r for r in rows.load(out) if replace(r.conditions, date="") == replace(where, date="", dirty=False)]
    done = {r.key for r in same} if not where.dirty else set()
    return [job for job in jobs if not job.keys <= done]


def _measure(jobs: list[Job], where: Conditions, out: Path | None) -> list[Row]:
    """Measure job by job and save each one's rows at once: what is interrupted loses one job."""
    measured: list[Row] = []
    with tqdm(total=sum(job.ticks for job in jobs), delay=2, disable=None, file=sys.stderr) as bar:
        for job in jobs:
            bar.set_description(job.name)
            new = job.run(where, bar.update)
            measured += new
            if out is not None:
                rows.append(out, new)
    return measured


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _known(names: Collection[str], known: Collection[str], option: str) -> list[str]:
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{option}: unknown {', '.join(unknown)}, wanted some of {', '.join(sorted(known))}")
    return list(names)


if __name__ == "__main__":
    sys.exit(main())
