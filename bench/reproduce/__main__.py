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
from .runs import trained, world
from .settings import SCALES, Settings, plan
from .store import Mixed, Record, Store


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench.reproduce", description=__doc__)
    p.add_argument("--scale", choices=SCALES, default="small", help="default: %(default)s, which two CPU cores do")
    p.add_argument("--quick", action="store_const", const="quick", dest="scale", help="--scale quick: does it run")
    p.add_argument("--out", type=Path, help="the folder of runs, page and figures; default: build/reproduce/SCALE")
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    out = options.out or Path("build", "reproduce", options.scale)
    try:
        records = _run(SCALES[options.scale], Store(out, SCALES[options.scale]))
    except Mixed as error:
        print(f"bench.reproduce: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{page.write(records, out)}\n{page.said(records)}\n{page.parity(records)}")
    return 0


def _run(settings: Settings, store: Store) -> list[Record]:
    """Make every run that is not there yet. A folder where nothing is missing needs no world."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # models this small lose more by waking a second one than they gain
    store.load()
    backends = [name for name, why in availability(device).items() if why.startswith("available")]
    left = [run for run in plan(settings, backends) if not store.has(run)]
    if left:
        with tqdm(total=settings.sft_steps + settings.steps * len(left), disable=None, file=sys.stderr) as bar:
            bar.set_description("the checkpoint and its pairs")
            start, where = world(settings, store.folder, device, bar.update), conditions(device)
            store.load(start.checkpoint)
            for run in left:
                bar.set_description(run.name)
                store.add(trained(run, settings, start, where, bar.update))
    return store.load()


if __name__ == "__main__":
    sys.exit(main())
