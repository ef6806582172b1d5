"""A function in several gloo processes on this CPU."""

from __future__ import annotations

import socket
from collections.abc import Callable

import torch
import torch.distributed as dist


def run(worker: Callable[..., None], *arguments: object, world: int = 2) -> None:
    """``worker(rank, *arguments)`` on each rank; raises what any of them raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_joined, (worker, port, arguments, world), nprocs=world)


def _joined(rank: int, worker: Callable[..., None], port: int, arguments: tuple, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        worker(rank, *arguments)
    finally:
        dist.destroy_process_group()
