"""``python -m bench`` measures: speed and memory per shape, accuracy against drift, whole training steps. Rows are
appended as they come; ``--resume`` goes on after an interruption. ``python -m bench report`` turns them into tables,
figures and a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from . import drift, roofline, rows, step
from .conditions import Conditions, conditions
from .providers import FLOOR, PROVIDERS
from .report.tables import markdown, tables
from .roofline import Ceiling
from .rows import Row
from .run import run
from .shapes import QUICK, SHAPES, Shape

QUICK_ROUNDS = 3
STEP_ROUNDS = 3
PARTS = ("speed", "accuracy", "step")
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """Something measured together: what it is called, how many ticks it takes, the keys of its rows, and how."""

    name: str
    ticks: int
    keys: tuple[tuple, ...]
    run: Callable[[Conditions, Tick], list[Row]]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench", description=__doc__)
    p.add_argument("command", nargs="?", choices=("run", "report"), default="run")
    families = dict.fromkeys(shape.family for shape in SHAPES.values())
    p.add_argument("--parts", type=_names, default=list(PARTS), help=f"of {', '.join(PARTS)}; default: all")
    p.add_argument("--shapes", type=_names, help=f"names or families ({', '.join(families)}); speed only")
    p.add_argument("--providers", type=_names, help="of those a shape lists, or 'ours' for all; floor always runs")
    p.add_argument("--dtypes", type=_names, help="of those a shape lists; default: all of them")
    p.add_argument("--rounds", type=int, help="timed rounds; default: each shape's own")
    p.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} only, {QUICK_ROUNDS} rounds; few drifts")
    p.add_argument("--resume", action="store_true", help="leave out what this commit has measured in this environment")
    p.add_argument("--device", default="cpu", help="cpu or cuda; default: %(default)s")
    p.add_argument("--out", type=Path, help="the JSON Lines file to append to, or to report from")
    p.add_argument("--to", type=Path, default=rows.FOLDER / "report", help="the folder of the report")
    p.add_argument("--no-save", action="store_true", help="print the table only")
    return p


def main(arguments: list[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(arguments)
    if options.command == "report":
        return _report(options)
    try:
        device = _device(options.device)
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
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"--rounds: got {options.rounds}, wanted at least 1")
    parts = _known(options.parts, PARTS, "--parts")
    families = {name.split("@")[0] for name in PROVIDERS}
    wanted = _known(options.providers or list(PROVIDERS), {*PROVIDERS, *families}, "--providers")
    dtypes = _known(options.dtypes or [], {"float32", "bfloat16"}, "--dtypes")

    def chosen(names: Iterable[str]) -> list[str]:
        return [n for n in names if n == FLOOR or n in wanted or n.split("@")[0] in wanted]

    jobs = []
    if "speed" in parts:
        jobs += _speed(options, device, chosen, dtypes)
    if "accuracy" in parts and not options.shapes:
        jobs += _accuracy(
            options.quick, device, chosen(drift.WHO), [d for d in drift.DTYPES if not dtypes or d in dtypes]
        )
    if "step" in parts and not options.shapes:
        jobs += _steps(options, device, chosen(step.WHO))
    if not jobs:
        raise ValueError("nothing to measure: no chosen part has a chosen shape, provider and dtype")
    return jobs


def _speed(
    options: argparse.Namespace, device: torch.device, chosen: Callable[[Iterable[str]], list[str]], dtypes: list[str]
) -> list[Job]:
    ceilings: dict[str, Ceiling] = {}

    def job(shape: Shape, dtype: str, names: list[str], rounds: int) -> Job:
        def measure(where: Conditions, tick: Tick) -> list[Row]:
            if dtype not in ceilings:
                ceilings[dtype] = roofline.measure(dtype, device)
            return run(shape, dtype, names, rounds, where, ceilings[dtype], tick, device)

        caches = ("hot", "cold") if device.type == "cuda" else ("hot",)
        keys = [_key(shape.name, shape.T, dtype, name, cache) for name in names for cache in caches]
        return Job(f"{shape.name} {dtype}", len(names) * (rounds + 1), tuple(keys), measure)

    jobs = []
    for shape in _shapes(options, device):
        names = chosen(shape.contenders)
        rounds = options.rounds or (QUICK_ROUNDS if options.quick else shape.rounds)
        for dtype in shape.dtypes:
            if (not dtypes or dtype in dtypes) and names != [FLOOR]:
                jobs.append(job(shape, dtype, names, rounds))
    return jobs


def _shapes(options: argparse.Namespace, device: torch.device) -> list[Shape]:
    """By name or family; unless asked for, those of this device."""
    if options.shapes is None:
        names = QUICK if options.quick else [s.name for s in SHAPES.values() if s.device == device.type]
        return [SHAPES[name] for name in names]
    families = {shape.family for shape in SHAPES.values()}
    wanted = _known(options.shapes, {*SHAPES, *families}, "--shapes")
    return [
        s for s in SHAPES.values() if s.name in wanted or (s.family in wanted and s.device in ("", device.type))
    ]  # fmt: skip


def _accuracy(quick: bool, device: torch.device, names: list[str], dtypes: list[str]) -> list[Job]:
    targets, absent = drift.QUICK if quick else drift.TARGETS, drift.absent(names, device)

    def job(dtype: str) -> Job:
        shapes = {name: ["drift"] if name in absent else [drift.name_of(t) for t in targets] for name in names}
        keys = tuple(_key(shape, drift.SHAPE.T, dtype, name) for name in names for shape in shapes[name])
        return Job(f"drift {dtype}", len(keys), keys,
                   lambda where, tick: drift.study(dtype, names, targets, where, tick, device))  # fmt: skip

    return [job(dtype) for dtype in dtypes] if names else []


def _steps(options: argparse.Namespace, device: torch.device, names: list[str]) -> list[Job]:
    rounds = options.rounds or STEP_ROUNDS

    def job(size: str) -> Job:
        shape, dtype, absent = step.shape_of(size), step.SIZES[size].dtype, step.absent(size, names, device)
        keys = [_key(shape.name, shape.T, dtype, n) for n in names]
        keys += [_key(step.context_name(size), None, dtype, n) for n in names if n not in absent]
        return Job(f"step {size}", len(keys), tuple(keys),
                   lambda where, tick: step.study(size, names, rounds, where, tick, device))  # fmt: skip

    sizes = step.QUICK if options.quick else [n for n, size in step.SIZES.items() if size.device == device.type]
    return [job(size) for size in sizes] if names else []


def _key(shape: str, T: int | None, dtype: str, name: str, cache: str = "hot") -> tuple:
    """As `Row.key`."""
    return shape, T, dtype, name.split("@")[0], PROVIDERS[name].budget, cache


def _left(jobs: list[Job], out: Path, where: Conditions) -> list[Job]:
    """Those of which a row is missing, or only known from another commit, environment or a changed checkout."""
    same = [r for r in rows.load(out) if replace(r.conditions, date="") == replace(where, date="", dirty=False)]
    done = {r.key for r in same} if not where.dirty else set()
    return [job for job in jobs if not done.issuperset(job.keys)]


def _measure(jobs: list[Job], where: Conditions, out: Path | None) -> list[Row]:
    """Rows are saved job by job: what was interrupted loses one."""
    measured: list[Row] = []
    with tqdm(total=sum(job.ticks for job in jobs), delay=2, disable=None, file=sys.stderr) as bar:
        for job in jobs:
            bar.set_description(job.name)
            new = job.run(where, bar.update)
            measured += new
            if out is not None:
                rows.append(out, new)
    return measured


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {name!r}, wanted cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got 'cuda', but torch sees no CUDA device")
    return torch.device(name)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _known(names: Collection[str], known: Collection[str], option: str) -> list[str]:
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{option}: unknown {', '.join(unknown)}, wanted some of {', '.join(sorted(known))}")
    return list(names)


if __name__ == "__main__":
    sys.exit(main())
