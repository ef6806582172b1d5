"""The self-check in a process group: ranks agree on what is wrong, and none waits for one that never comes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from checked_steps import fresh_process  # noqa: F401 - for every test here

from tdpo_kernels.backends import launch
from tdpo_kernels.backends.selfcheck import peers

RANK = """
import os, sys, time, torch
import torch.distributed as dist
sys.path[:0] = {paths!r}
from tdpo_kernels.backends import launch
from tdpo_kernels.backends.selfcheck import peers
import checked_steps as tests
launch.choose = tests.small_tile
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:{port}", rank=rank, world_size=2)
peers.Peers.GRACE = {grace}
def attempt():
    try:
        tests.step(tests.problem(), 0)
        return "fine"
    except RuntimeError as error:
        return " ".join(str(error).split())
{work}
print("SAID", said, flush=True)
"""


def two_ranks(work: str, grace: float) -> list[str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(Path(launch.__file__).parents[2])]
    script = RANK.format(paths=paths, port=port, grace=grace, work=work)
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(r)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
        )  # fmt: skip
        for r in range(2)
    ]
    try:
        texts = [rank.communicate(timeout=150)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(texts)
    return [next(line for line in text.splitlines() if line.startswith("SAID")) for text in texts]


def test_ranks_raise_together_though_only_one_is_wrong_and_late():
    said = two_ranks(
        """
if rank == 1:
    time.sleep(2)
    run = launch.fused_stats
    launch.fused_stats = lambda *a: run(*tests.wrong_label(*a))
said = attempt()
""",
        grace=60.0,
    )
    assert "another process" in said[0] and "rank 1" in said[0] and "fused_stats" in said[0]
    assert "a kernel disagrees" in said[1] and "another process" not in said[1]


def test_a_rank_that_checks_alone_waits_once_and_no_longer():
    """Rank 1 is in a collective that rank 0 has yet to join: an agreement that waited for it would never end."""
    said = two_ranks(
        """
began = time.monotonic()
first = attempt() if rank == 0 else "elsewhere"
dist.barrier()
second = attempt()
said = (first, second, time.monotonic() - began < 60)
""",
        grace=2.0,
    )
    assert "('fine', 'fine', True)" in said[0] and "('elsewhere', 'fine', True)" in said[1]


def test_the_wait_ends():
    began = time.monotonic()
    assert not peers.wait(lambda: False, 0.05) and peers.wait(lambda: True, 0.0)
    assert time.monotonic() - began < 2
