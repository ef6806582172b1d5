"""A function in several gloo processes on this CPU."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

SLOW_TO_IMPORT = {"torch", "triton", "hypothesis", "pytest", "transformers", "peft", "accelerate", "datasets", "trl"}


def run(worker: Callable[..., None], *arguments: object, world: int = 2) -> None:
    """``worker(rank, *arguments)`` on each rank, with a launcher's environment; raises what any of them raised.

    Processes are forked from one that has imported what this one has and nothing else, for imports take longer than
    most tests.
    """
    multiprocessing.set_forkserver_preload([x for x in sys.modules if x.split(".")[0] in SLOW_TO_IMPORT])
    with tempfile.TemporaryDirectory() as folder:  # a file to meet at: a free port may be taken before it is bound
        arguments = (worker, Path(folder, "met"), arguments, world)
        torch.multiprocessing.start_processes(_joined, arguments, nprocs=world, start_method="forkserver")


def _joined(rank: int, worker: Callable[..., None], met: Path, arguments: tuple, world: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", init_method=met.as_uri(), rank=rank, world_size=world)
    try:
        worker(rank, *arguments)
    finally:
        dist.destroy_process_group()
    # Without the interpreter's own end: a thread of gloo may still hold a tensor's Python object (a mesh keeps its
    # groups alive after they are destroyed), and letting go of it while the interpreter ends aborts the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
