"""Hold that all ranks say what they do not agree on, and that a rank that dies ends the others."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from batches import trained
from processes import run
from splitting import D, E, L, P, call_of, cut, leaf, rows_of
from torch import nn

from tdpo_kernels import LMHead, directions, fused_tdpo_loss, token_stats
from tdpo_kernels.parallel import sequence_parallel_loss, vocab_parallel

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")


def refusals(rank: int, world: int) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    V = 37
    call, mesh = call_of(V, 3, torch.float32), init_device_mesh("cpu", (world,))
    call["labels"] = call["labels"].clamp(max=20)  # so that they are there when a head is told to be smaller
    part = cut(call["head"], rows_of(V, world, "even")[rank])
    head = vocab_parallel(part)
    for placement in (Shard(1), Replicate()):
        with pytest.raises(ValueError, match=r"^head.weight: got placements .*, wanted \(Shard\(dim=0\),\)"):
            vocab_parallel(distribute_tensor(call["head"].weight, mesh, [placement]))
    _no_dtensor_is_taken_for_a_whole_one(call, mesh)
    with pytest.raises(ValueError, match="^head: got a whole head with a vocabulary-parallel ref_head"):
        token_stats(**call | {"ref_head": vocab_parallel(cut(call["ref_head"], rows_of(V, world, "even")[rank]))})
    with pytest.raises(ValueError, match=f"^ref_head.weight: .*V = {V}; wanted V = {V - 1}"):
        token_stats(**call | {"head": vocab_parallel(part, vocab_size=V - 1)})
    with pytest.raises(ValueError, match=f"^vocab_size: got int {V + 1}, wanted an int from 1 to {V}"):
        vocab_parallel(part, vocab_size=V + 1)
    with pytest.raises(ValueError, match=f"^labels: .* outside .0, {V}"):
        token_stats(**call | {"head": head, "labels": call["labels"].clone().fill_(V)})
    other = torch.where(call["labels"] < 0, -100, (call["labels"] + rank) % V)
    changes = {
        "labels: a checksum": {"labels": other},
        "labels, memory_budget: how many go together": {
            "labels": torch.where(torch.arange(L) < rank + 3, -100, call["labels"])
        },
        "hidden: its gradient is wanted": {"hidden": call["hidden"].clone().requires_grad_(rank == 0)},
        "head.softcap": {"head": replace(head, softcap=5.0 + rank)},
        "head.logit_scale": {"head": replace(head, logit_scale=1.0 + rank)},
        "head.bias: there is one": {"head": replace(head, bias=None if rank else head.bias)},
        "head: rows of each rank": {"head": vocab_parallel(part, vocab_size=V - 1 - (rank == 0))},
        "ref_head.softcap": {"ref_head": replace(call["ref_head"], softcap=5.0 + rank)},
    }
    for what, change in changes.items():
        more = {"ref_head": LMHead(call["ref_head"].weight[: V - 1 - (rank == 0)])} if "rows" in what else {}
        with pytest.raises(ValueError, match=f"^{what}: .* ranks of the head's group have .*, wanted the same"):
            token_stats(**call | more | change if "head" in change else call | {"head": head} | change)
    pieces = DTensor.from_local(call["head"].weight[: V // world - (rank == 0)], mesh, [Shard(0)])
    with pytest.raises(ValueError, match="^head: rows of each rank: .*wanted the same"):
        uneven = vocab_parallel(pieces)
        token_stats(**call | {"head": uneven, "ref_head": call["ref_head"].weight[: uneven.vocab]})

    for what, given in {
        "head.weight: D: ": call["head"].weight[:, : D - (rank == 0)],
        "head.weight: dtype: ": call["head"].weight.to(torch.float64 if rank else torch.float32),
        "head.bias: there is one: ": LMHead(part.weight, None if rank else part.bias),
        "head.bias: got .*, wanted .*rank 0 of the group": LMHead(
            part.weight, part.bias if rank else call["head"].bias
        ),
    }.items():
        with pytest.raises(ValueError, match=f"^{what}"):
            vocab_parallel(given)
    with pytest.raises(TypeError, match="^group: got str 'tp', wanted a process group"):
        vocab_parallel(part, "tp")
    patched = nn.Linear(D, V)
    patched.forward = lambda x: x
    with pytest.raises(TypeError, match="^head: got a Linear with a forward of its own"):
        vocab_parallel(patched)
    stats, ids = token_stats(**call), torch.full(call["labels"].shape, 2 * P - 1)
    stats.logp[1, 2] = stats.kl[1, 2] = 0.0  # a model may be that sure: no token is told by its numbers to count
    ids[1, 2] = 2 * P if rank == 0 else 0
    with pytest.raises(ValueError, match=rf"^sequence_ids: got 1 outside \[0, {2 * P}\), wanted none"):
        sequence_parallel_loss(stats, ids, P)


def _no_dtensor_is_taken_for_a_whole_one(call: dict, mesh) -> None:
    """Law 6: `full_tensor()` under FSDP2 gives a wrong head gradient, so nobody gathers behind the user's back."""
    from torch.distributed.fsdp import fully_shard  # slow to import, and not needed by every test's processes
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    sharded = {name: nn.Linear(size, 37) for name, size in (("head", D), ("ref_head", E))}
    [fully_shard(x) for x in sharded.values()]
    placed = [(name, distribute_tensor(call[name].weight, mesh, [p])) for name in sharded for p in (Shard(0), Shard(1))]
    whole = [(name, distribute_tensor(call[name].weight, mesh, [Replicate()])) for name in sharded]
    for name, x in (*sharded.items(), *placed, *whole, ("hidden", distribute_tensor(call["hidden"], mesh, [Shard(0)]))):
        with pytest.raises(TypeError, match=rf"^{name}.*: got a .*DTensor.*, wanted a plain dense tensor"):
            token_stats(**call | {name: x})


@pytest.mark.parametrize("world", (2, pytest.param(4, marks=pytest.mark.long)))
def test_what_ranks_do_not_agree_on_is_refused(world: int):
    run(refusals, world, world=world)


def other_budgets(rank: int, world: int, frozen: bool) -> None:
    """A budget says which rows go together, so ranks of different ones would wait for one another."""
    directions.LEAST["cpu"] = 7
    call, _ = trained(call_of(37, 3, torch.float32), frozen)
    call["head"] = vocab_parallel(cut(call["head"], rows_of(37, world, "even")[rank]))
    with pytest.raises(ValueError, match="^labels, memory_budget: how many go together: .* have .*, wanted the same"):
        fused_tdpo_loss(**call, memory_budget=(15, 24)[rank] * 2 * 32 * 4)


@pytest.mark.parametrize("frozen", [False, True], ids=["groups", "directions"])
def test_ranks_of_a_split_vocabulary_want_one_budget(frozen: bool):
    run(other_budgets, 2, frozen, world=2)


def one_of_them_dies(rank: int, world: int, reached) -> None:
    call = call_of(37, 3, torch.float32)
    head = vocab_parallel(leaf(cut(call["head"], rows_of(37, world, "even")[rank])))
    loss = fused_tdpo_loss(**call | {"head": head, "hidden": call["hidden"].clone().requires_grad_()}).loss
    if rank == 1:
        os._exit(0)
    with pytest.raises(
        RuntimeError, match=r"tdpo_kernels: all-reduce of .* over ranks .* failed on rank .*one of them died"
    ):
        loss.backward()
    reached[rank] = True


def test_a_rank_that_dies_ends_the_others_with_a_message():
    reached = torch.zeros(3, dtype=torch.bool).share_memory_()
    begun = time.monotonic()
    run(one_of_them_dies, 3, reached, world=3)
    assert reached.tolist() == [True, False, True] and time.monotonic() - begun < 60


def a_group_of_the_same_name(rank: int, world: int, met: str) -> None:
    """Names are given anew once groups are destroyed."""
    call = call_of(37, 3, torch.float32)
    for life in range(2):
        if life:
            dist.destroy_process_group()
            dist.init_process_group("gloo", init_method=met, rank=rank, world_size=world)
        head = vocab_parallel(cut(call["head"], rows_of(37, world, "even")[rank]))
        if not life:
            token_stats(**call | {"head": head})
    with pytest.raises(ValueError, match="^head.softcap: .*wanted the same"):
        token_stats(**call | {"head": replace(head, softcap=5.0 + rank)})


def test_a_group_of_the_same_name_is_asked_anew(tmp_path):
    run(a_group_of_the_same_name, 2, (tmp_path / "met").as_uri(), world=2)
