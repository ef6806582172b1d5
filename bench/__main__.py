"""``python -m bench`` measures speed and memory per shape, accuracy against drift, whole training steps. Rows are
appended as they come; ``--resume`` goes on after an interruption. ``python -m bench report`` turns them into tables
and figures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from . import measure, rows
from .conditions import Conditions, conditions
from .providers import FLOOR, PROVIDERS
from .report.tables import cliffs, markdown, tables
from .rows import Row
from .run import run
from .shapes import QUICK, SHAPES, Shape

ROUNDS = 3  # of quick runs


class Job(NamedTuple):
    """Something measured together."""

    shape: Shape
    dtype: str
    names: list[str]
    rounds: int

    @property
    def keys(self) -> set[tuple]:
        """Return `Row.key` of the rows to come."""
        return {(self.shape.name, self.dtype, name.split("@")[0], PROVIDERS[name].budget) for name in self.names}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench", description=__doc__)
    p.add_argument("command", nargs="?", choices=("run", "report"), default="run")
    families = dict.fromkeys(shape.family for shape in SHAPES.values())
    p.add_argument("--shapes", type=lambda text: text.split(","), help=f"names or families ({', '.join(families)})")
    p.add_argument("--providers", type=lambda text: text.split(","), help="any it lists, or 'ours'; floor always runs")
    p.add_argument("--dtypes", type=lambda text: text.split(","), help="of those a shape lists; default: all of them")
    p.add_argument("--rounds", type=int, choices=range(1, 1000), metavar="N", help="default: each shape's own")
    p.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} only, {ROUNDS} rounds")
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
    if options.device == "cuda" and not torch.cuda.is_available():
        p.error("--device: got 'cuda', but torch sees no CUDA device")
    try:
        jobs = _plan(options)
    except ValueError as error:
        p.error(str(error))
    where = conditions(options.device)
    out = options.out or rows.file_of(where.device)
    jobs = _left(jobs, out, where) if options.resume else jobs
    measured = _measure(jobs, where, torch.device(options.device), None if options.no_save else out)
    print(markdown(tables(measured)))
    return int(any(row.red for row in measured) or bool(cliffs(measured)))


def _report(options: argparse.Namespace) -> int:
    from .report.build import write  # needs matplotlib, which measuring does not

    files = [options.out] if options.out else sorted(rows.FOLDER.glob("*.jsonl"))
    shown = {path.stem: rows.together(rows.load(path)) for path in files}
    print(write(shown, options.to))
    return int(any(map(cliffs, shown.values())))


def _plan(options: argparse.Namespace) -> list[Job]:
    wanted = _known(options.providers or PROVIDERS, {*PROVIDERS, *(n.split("@")[0] for n in PROVIDERS)}, "--providers")
    dtypes = _known(options.dtypes or (), {"float32", "bfloat16"}, "--dtypes")
    jobs = []
    for shape in _shapes(options):
        names = [n for n in shape.contenders if n == FLOOR or n in wanted or n.split("@")[0] in wanted]
        rounds = options.rounds or (ROUNDS if options.quick else shape.rounds)
        jobs += [Job(shape, dtype, names, rounds) for dtype in shape.dtypes if not dtypes or dtype in dtypes]
    jobs = [job for job in jobs if not set(job.names) <= {FLOOR}]
    if not jobs:
        raise ValueError("nothing to measure: no chosen shape has a chosen provider and dtype")
    return jobs


def _shapes(options: argparse.Namespace) -> list[Shape]:
    """Return shapes by name or family; unless asked for, those of this device."""
    if options.shapes is None:
        default = QUICK if options.quick else [s.name for s in SHAPES.values() if s.device in ("any", options.device)]
        return [SHAPES[name] for name in default]
    wanted = _known(options.shapes, {*SHAPES, *(shape.family for shape in SHAPES.values())}, "--shapes")
    here = ("", "any", options.device)
    return [s for s in SHAPES.values() if s.name in wanted or s.family in wanted and s.device in here]


def _left(jobs: list[Job], out: Path, where: Conditions) -> list[Job]:
    """Return the jobs of which a row is missing, or known only from another commit, environment or changed checkout."""
    same = [r for r in rows.load(out) if replace(r.conditions, date="") == replace(where, date="", dirty=False)]
    done = {r.key for r in same} if not where.dirty else set()
    return [job for job in jobs if not job.keys <= done]


def _measure(jobs: list[Job], where: Conditions, device: torch.device, out: Path | None) -> list[Row]:
    """Measure job by job and save each one's rows at once: what is interrupted loses one job."""
    measured: list[Row] = []
    ceiling = cache(lambda dtype: measure.ceiling(dtype, device))
    ticks = sum(len(job.names) * (job.rounds + 1) for job in jobs)
    with tqdm(total=ticks, delay=2, disable=None, file=sys.stderr) as bar:
        for job in jobs:
            bar.set_description(f"{job.shape.name} {job.dtype}")
            rate = ceiling(job.dtype) if FLOOR in job.names else None
            new = run(*job, where, rate, bar.update, device)
            measured += new
            if out is not None:
                rows.append(out, new)
    return measured


def _known(names: Collection[str], known: Collection[str], option: str) -> Collection[str]:
    names = [name.strip() for name in names]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{option}: unknown {', '.join(unknown)}, wanted some of {', '.join(sorted(known))}")
    return names


if __name__ == "__main__":
    sys.exit(main())
