"""``python -m bench.reproduce``: the controlled-sentiment experiment, trained, measured and drawn. The same command
goes on where it was interrupted; on a GPU if there is one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from tdpo_kernels.backends import availability

from ..conditions import conditions
from . import page
from .settings import SCALES, Run, Settings, plan
from .store import Mixed, Store
from .training import trained
from .world import World, ticks, world

DEFAULT = Path("build/reproduce")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench.reproduce", description=__doc__)
    p.add_argument("--scale", choices=SCALES, default="small", help="default: %(default)s, which two CPU cores do")
    p.add_argument(
        "--quick", action="store_const", const="quick", dest="scale", help="--scale quick: does it run at all"
    )
    p.add_argument("--out", type=Path, help=f"the folder of runs, page and figures; default: {DEFAULT}/SCALE")
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    settings = SCALES[options.scale]
    out = options.out or DEFAULT / options.scale
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        records = _run(settings, Store(out, settings), device)
    except Mixed as error:
        print(f"bench.reproduce: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{page.write(records, out)}\n{page.said(records)}\n{page.parity(records)}")
    return 0


def _run(settings: Settings, store: Store, device: torch.device) -> list:
    """Every run that is not there yet. A folder where nothing is missing needs no world."""
    torch.set_num_threads(1)  # models this small lose more by waking a second one than they gain
    store.load()
    left = [run for run in plan(settings, backends(device)) if not store.has(run)]
    if left:
        with tqdm(total=ticks(settings) + settings.steps * len(left), disable=None, file=sys.stderr) as bar:
            bar.set_description("the checkpoint and its pairs")
            start = world(settings, store.folder, device, bar.update)
            store.load(start.checkpoint)
            _train(left, settings, start, store, device, bar)
    return store.load()


def _train(left: list[Run], settings: Settings, start: World, store: Store, device: torch.device, bar: tqdm) -> None:
    where = conditions(device)
    for run in left:
        bar.set_description(run.name)
        store.add(trained(run, settings, start, where, bar.update))


def backends(device: torch.device) -> list[str]:
    """Those that run here."""
    return [name for name, why in availability(device).items() if why.startswith("available")]


if __name__ == "__main__":
    sys.exit(main())
