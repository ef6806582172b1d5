"""``python -m bench`` measures; ``python -m bench report`` prints the latest row of everything ever measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from pathlib import Path

from tqdm import tqdm

from . import report, rows
from .conditions import conditions
from .providers import FLOOR, PROVIDERS
from .run import run
from .shapes import FULL, QUICK, SHAPES, Shape

QUICK_ROUNDS = 3


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench", description=__doc__)
    p.add_argument("command", nargs="?", choices=("run", "report"), default="run")
    p.add_argument("--shapes", type=_names, help=f"of {', '.join(SHAPES)}; default: all but {', '.join(QUICK)}")
    p.add_argument("--providers", type=_names, help=f"of {', '.join(PROVIDERS)}, or 'ours' for all; floor always runs")
    p.add_argument("--dtypes", type=_names, help="of those a shape lists; default: all of them")
    p.add_argument("--rounds", type=int, help="timed rounds; default: each shape's own")
    p.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} only, {QUICK_ROUNDS} rounds")
    p.add_argument("--out", type=Path, default=rows.RESULTS, help="the JSON Lines file to append to, or to report from")
    p.add_argument("--no-save", action="store_true", help="print the table only")
    return p


def main(arguments: list[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(arguments)
    if options.command == "report":
        print(report.tables(rows.latest(rows.load(options.out))))
        return 0
    try:
        plan = _plan(options)
    except ValueError as error:
        p.error(str(error))
    measured = _measure(plan)
    print(report.tables(measured))
    if not options.no_save:
        rows.append(options.out, measured)
    return int(any(row.red for row in measured))


def _plan(options: argparse.Namespace) -> list[tuple[Shape, str, list[str], int]]:
    """Shape, dtype, contenders and rounds of each part of the run."""
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"--rounds: got {options.rounds}, wanted at least 1")
    chosen = _known(options.shapes or (QUICK if options.quick else FULL), SHAPES, "--shapes")
    families = {name.split("@")[0] for name in PROVIDERS}
    wanted = _known(options.providers or list(PROVIDERS), {*PROVIDERS, *families}, "--providers")
    dtypes = _known(options.dtypes or [], {d for s in SHAPES.values() for d in s.dtypes}, "--dtypes")
    plan = []
    for shape in map(SHAPES.__getitem__, chosen):
        names = [n for n in shape.contenders if n == FLOOR or n in wanted or n.split("@")[0] in wanted]
        rounds = options.rounds or (QUICK_ROUNDS if options.quick else shape.rounds)
        plan += [(shape, dtype, names, rounds) for dtype in shape.dtypes if not dtypes or dtype in dtypes]
    if all(names == [FLOOR] for _, _, names, _ in plan):
        raise ValueError("nothing to measure: no chosen shape has a chosen provider and dtype, see bench/shapes.py")
    return plan


def _measure(plan: list[tuple[Shape, str, list[str], int]]) -> list[rows.Row]:
    where, measured = conditions(), []
    total = sum(len(names) * (rounds + 1) for _, _, names, rounds in plan)
    with tqdm(total=total, delay=2, disable=None, file=sys.stderr) as bar:
        for shape, dtype, names, rounds in plan:
            bar.set_description(f"{shape.name} {dtype}")
            measured += run(shape, dtype, names, rounds, where, bar.update)
    return measured


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _known(names: Collection[str], known: Collection[str], option: str) -> list[str]:
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{option}: unknown {', '.join(unknown)}, wanted some of {', '.join(sorted(known))}")
    return list(names)


if __name__ == "__main__":
    sys.exit(main())
