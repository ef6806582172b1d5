"""``python -m bench.compiled``: a line for every shipped configuration on every target; exits 1 on a fault."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import astuple
from importlib.metadata import version
from multiprocessing import get_context

from .binary import TARGETS, unavailable
from .jobs import Job, attempt, core, jobs

COLUMNS = ("regs", "stack", "shared", "tmem", "mma", "wide", "tma", "s")
WHAT_IT_IS = """\
Compiled, not run: no GPU was there. Registers and bytes of stack a thread; bytes of shared memory and columns of tensor
memory a block; instructions for tensor cores, those of them of whole warpgroups, bulk copies; seconds of compiling."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__)
    parser.add_argument("--core", action="store_true", help="only the few that `make test` compiles")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all of them; can be repeated")
    parser.add_argument("--jobs", type=int, default=2, help="compiled at once; default: %(default)s")
    parser.add_argument("--out", type=argparse.FileType("w"), default=sys.stdout, metavar="FILE", help="printed there")
    arguments = parser.parse_args(argv)
    if reason := unavailable():
        print(f"nothing can be compiled here: {reason}")
        return 2
    targets = [TARGETS[name] for name in arguments.target or TARGETS]
    wanted = [job for target in targets for job in (core if arguments.core else jobs)(target)]
    with redirect_stdout(arguments.out):
        print("python -m bench.compiled", *(sys.argv[1:] if argv is None else argv))
        return print_reports(wanted, arguments.jobs)


def print_reports(wanted: list[Job], workers: int = 2) -> int:
    """Print a line for each job as it is done; return 1 if any has a fault, else 0."""
    print(f"triton {version('triton')}, {len(wanted)} builds\n\n{WHAT_IT_IS}\n")
    print(_line("target", "case", "tile", COLUMNS))
    failed = 0  # processes, not threads: before Python 3.13 two threads in `ast.parse` can fail each other
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for job, made in zip(wanted, pool.map(attempt, wanted), strict=True):
            (*numbers, seconds, faults), config = astuple(made), job.config
            tile = f"{config.R}x{config.C}x{config.K} w{config.warps} s{config.stages}{' tma' if config.tma else ''}"
            print(_line(job.target.name, str(job), tile, [*numbers, f"{seconds:.1f}"]))
            print("".join(f"  FAILED: {fault}\n" for fault in faults), end="", flush=True)
            failed += bool(faults)
    print(f"\n{len(wanted) - failed} sound, {failed} failed")
    return 1 if failed else 0


def _line(target: str, case: str, tile: str, columns: Iterable[object]) -> str:
    return f"{target:7}{case:54}{tile:21}" + "".join(f"{value!s:>7}" for value in columns)


if __name__ == "__main__":
    sys.exit(main())
