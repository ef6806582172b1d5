"""Vocabularies, sequences and batches over gloo processes, each against one process that has everything."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from processes import run
from runnable import runnable
from torch import Tensor

from tdpo_kernels import LMHead, TokenStats, fused_tdpo_loss, token_stats
from tdpo_kernels.parallel import mean_over_ranks, sequence_parallel_loss, vocab_parallel

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")

P, L, D, E = 3, 7, 8, 6
WORLDS = (2, pytest.param(4, marks=pytest.mark.long))
EXTRAS = ("entropy", "mean_logit", "is_argmax")
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}


def call_of(V: int, seed: int, dtype: torch.dtype, hard: str = "") -> dict:
    """Pairs of ragged lengths. `hard`: what else is special about the heads."""
    g = torch.Generator().manual_seed(seed)
    std = 4.0 if hard == "peaked" else 0.7
    x, ref = (torch.randn(2 * P, L, n, generator=g, dtype=torch.float64) for n in (D, E))
    weight, ref_weight = (torch.randn(V, n, generator=g, dtype=torch.float64) * std for n in (D, E))
    bias, ref_bias = torch.randn(2, V, generator=g, dtype=torch.float64)
    options, ref_options = dict(logit_scale=1.0, softcap=None), dict(logit_scale=0.5, softcap=None)
    if hard == "equal":
        ref, ref_weight, ref_bias, ref_options = x, weight, bias, options
    if hard == "offset":
        ref_bias = ref_bias + 300.0
    if hard == "ruled out":  # the first columns, so whole ranks of small vocabularies
        bias[: V // 2] = ref_bias[: V // 2] = -torch.inf
    if hard == "softcap":
        options["softcap"] = 5.0
    labels = torch.randint(V // 2 if hard == "ruled out" else 0, V, (2 * P, L), generator=g)
    labels[0, :4] = labels[P, 5:] = -100
    tensors = (x, weight, bias, ref, ref_weight, ref_bias)
    x, weight, bias, ref, ref_weight, ref_bias = (t.to(dtype) for t in tensors)
    head, ref_head = LMHead(weight, bias, **options), LMHead(ref_weight, ref_bias, **ref_options)
    return dict(hidden=x, head=head, ref_hidden=ref, ref_head=ref_head, labels=labels)


def rows_of(V: int, world: int, how: str) -> list[slice]:
    """Of each rank: as torch cuts; all but nothing on the last; as evenly as it goes."""
    if how == "chunk":
        step = -(-V // world)
        ends = [min(step * (k + 1), V) for k in range(world)]
    elif how == "lopsided":
        ends = [V - 1 if k == 0 else V - 1 + (k > 1) for k in range(world)] if world > 2 else [V - 1, V]
    else:
        ends = [V * (k + 1) // world for k in range(world)]
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def cut(head: LMHead, rows: slice) -> LMHead:
    return LMHead(head.weight[rows], head.bias[rows], head.logit_scale, head.softcap)


def evaluated(call: dict, head: LMHead, **options) -> tuple[TokenStats, list[Tensor]]:
    """The statistics, and the gradients for random cotangents: to hidden, weight and bias."""
    hidden = call["hidden"].clone().requires_grad_()
    stats = token_stats(**call | {"hidden": hidden, "head": head}, extras=EXTRAS, **options)
    g = torch.Generator().manual_seed(9)
    g_logp, g_kl = torch.randn(2, *stats.logp.shape, generator=g, dtype=torch.float64).to(stats.logp.dtype)
    g_kl[0], g_kl[1] = 0.0, g_logp[1]  # DPO's rows, and TDPO1's
    grads = torch.autograd.grad([stats.logp, stats.kl], [hidden, head.weight, head.bias], [g_logp, g_kl])
    return stats, list(grads)


def leaf(head: LMHead) -> LMHead:
    weight, bias = head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()
    return LMHead(weight, bias, head.logit_scale, head.softcap)


def near(got: Tensor, want: Tensor, dtype: torch.dtype, what: str) -> None:
    """Within some roundings of the largest entry."""
    assert got.dtype == want.dtype and got.shape == want.shape, what
    finite = torch.isfinite(want)
    assert torch.equal(got[~finite], want[~finite]), what
    scale = want[finite].abs().max().item() if finite.any() else 0.0
    error = (got[finite].double() - want[finite].double()).abs().max().item() if finite.any() else 0.0
    assert error <= 64 * EPS[dtype] * scale + 1e-300, f"{what}: {error:.2e} of {scale:.2e}"


VOCABULARIES = [
    *[(37, how, "", torch.float64) for how in ("chunk", "lopsided", "even")],
    *[(37, "chunk", hard, torch.float64) for hard in ("peaked", "equal", "offset", "ruled out", "softcap")],
    (5, "chunk", "", torch.float64),  # four ranks hold 2, 2, 1 and 0
    (211, "even", "", torch.float32),
    (211, "even", "", torch.bfloat16),
    (211, "even", "equal", torch.float32),
]


def vocabularies(rank: int, world: int, backends: list[str]) -> None:
    for backend in backends:
        for V, how, hard, dtype in VOCABULARIES:
            for budget in (0, 2**20):
                for reference in ("alike", "whole", "elsewhere"):
                    _a_vocabulary(rank, world, backend, V, how, hard, dtype, budget, reference)


def _a_vocabulary(
    rank: int, world: int, backend: str, V: int, how: str, hard: str, dtype: torch.dtype, budget: int, reference: str
) -> None:
    call = call_of(V, 3, dtype, hard)
    options = dict(backend=backend, memory_budget=budget)
    want, want_grads = evaluated(call, leaf(call["head"]), **options)
    mine, other = rows_of(V, world, how)[rank], rows_of(V, world, "lopsided" if how == "even" else "even")[rank]
    whole = leaf(call["head"])
    head = vocab_parallel(cut(whole, mine))
    parts = {"whole": call["ref_head"], "alike": mine, "elsewhere": other}[reference]
    ref_head = parts if isinstance(parts, LMHead) else vocab_parallel(cut(call["ref_head"], parts))
    got, grads = evaluated(call | {"ref_head": ref_head}, head, **options)
    what = f"{backend} V={V} {how} {hard} {dtype} {budget} {reference} of {world}"
    for name in ("logp", "ref_logp", "kl"):
        near(getattr(got, name), getattr(want, name), got.logp.dtype, f"{what}: {name}")
    for name in EXTRAS:
        near(got.extras[name], want.extras[name], got.logp.dtype, f"{what}: {name}")
    if hard == "equal":
        assert not got.kl.any(), what
    wanted = [want_grads[0], want_grads[1][mine], want_grads[2][mine]]
    for name, a, b in zip(("hidden", "weight", "bias"), grads, wanted, strict=True):
        if b.numel():
            near(a, b, dtype, f"{what}: {name}")


@pytest.mark.parametrize("world", WORLDS)
def test_a_split_vocabulary_gives_what_a_whole_one_does(world: int):
    run(vocabularies, world, runnable(), world=world)


def tensor_parallel_layers(rank: int, world: int) -> None:
    """What torch's tensor parallelism makes of an LM head, gradients and all; and rows that are padding."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    V, dtype = 37, torch.float64
    call, mesh = call_of(V, 5, dtype), init_device_mesh("cpu", (world,))
    want, want_grads = evaluated(call, leaf(call["head"]))
    tensors = call["head"].weight, call["head"].bias
    sharded = LMHead(*(distribute_tensor(x.clone(), mesh, [Shard(0)]).requires_grad_() for x in tensors))
    hidden = call["hidden"].clone().requires_grad_()
    loss = fused_tdpo_loss(**call | {"hidden": hidden, "head": vocab_parallel(sharded)}).loss
    alone = leaf(call["head"])
    other = call["hidden"].clone().requires_grad_()
    single = fused_tdpo_loss(**call | {"hidden": other, "head": alone}).loss
    loss.backward(), single.backward()
    near(loss.detach(), single.detach(), dtype, "loss")
    for a, b in ((hidden, other), (sharded.weight, alone.weight), (sharded.bias, alone.bias)):
        near(a.grad.full_tensor() if hasattr(a.grad, "full_tensor") else a.grad, b.grad, dtype, "gradient")

    step = -(-V // world) + 3  # padded to `step` rows a rank, with what would be most likely of all

    def step_of(x: Tensor) -> Tensor:
        return fused_tdpo_loss(**call | {"hidden": 2 * x, "head": vocab_parallel(sharded)}).loss

    near(torch.compile(step_of, backend="eager")(hidden), step_of(hidden), dtype, "loss, compiled")
    padded = LMHead(*(torch.cat([x, x.new_full((step * world - V, *x.shape[1:]), 9.0)]) for x in tensors))
    whole = leaf(padded)
    head = vocab_parallel(cut(whole, slice(step * rank, step * (rank + 1))), vocab_size=V)
    assert sum(head.sizes) == head.vocab == V
    got, grads = evaluated(call, head)
    near(got.kl, want.kl, dtype, "kl without padding")
    near(grads[0], want_grads[0], dtype, "hidden without padding")


def shifted(labels: Tensor) -> Tensor:
    """Labels where they are predicted: what a sequence that is cut needs, as its next token may lie elsewhere."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)


def sequences(rank: int, world: int) -> None:
    """Every token of every sequence on some rank, in ragged pieces; alone, and on a mesh with a split vocabulary."""
    from torch.distributed.tensor import init_device_mesh

    V, dtype = 23, torch.float64
    call, generator = call_of(V, 7, dtype), torch.Generator().manual_seed(1)
    labels, ids = shifted(call["labels"]).flatten(), torch.arange(2 * P).repeat_interleave(L)
    where = torch.randint(0, world, labels.shape, generator=generator)
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("sequence", "vocabulary"))
    for options in (dict(variant="tdpo1"), dict(alpha=0.3), dict(reduction="none")):
        head, hidden = leaf(call["head"]), call["hidden"].clone().requires_grad_()
        single = fused_tdpo_loss(**call | {"hidden": hidden, "head": head}, **options)
        single.loss.sum().backward()
        for group, parts in ((dist.group.WORLD, 1), (mesh["sequence"].get_group(), 2)):
            size, me = dist.get_world_size(group), dist.get_rank(group)
            at = (where % size == me).nonzero()[:, 0]
            own, flat = leaf(call["head"]), call["hidden"].flatten(0, 1)[at].clone().requires_grad_()
            given = own
            if parts == 2:
                mine = rows_of(V, 2, "even")[mesh["vocabulary"].get_local_rank()]
                given = vocab_parallel(cut(own, mine), mesh["vocabulary"].get_group())
            ref = call["ref_hidden"].flatten(0, 1)[at]
            stats = token_stats(flat[None], given, ref[None], call["ref_head"], labels[at][None], shift=False)
            out = sequence_parallel_loss(stats, ids[at][None], P, group, **options)
            for name in vars(single):
                near(getattr(out, name).detach(), getattr(single, name).detach(), dtype, f"{options} {name}")
            out.loss.sum().backward()
            near(flat.grad, hidden.grad.flatten(0, 1)[at], dtype, f"{options} hidden")
            total = own.weight.grad.clone()
            dist.all_reduce(total)
            near(total * parts * size / world, head.weight.grad, dtype, f"{options} weight")


def shares(rank: int, world: int) -> None:
    """Ranks of 1, 0, 2, ... pairs: gradients averaged as DDP does are those of the mean over all pairs."""
    V, dtype = 23, torch.float64
    call = call_of(V, 11, dtype)
    head = leaf(call["head"])
    want = fused_tdpo_loss(**call | {"head": head}).loss
    want.backward()
    pairs = torch.tensor([[0], [], [1], [2]][rank] if world > 2 else [[0], [1, 2]][rank], dtype=torch.long)
    own = leaf(call["head"])
    rows = torch.cat([pairs, pairs + P])
    mine = {name: x if "head" in name else x[rows] for name, x in call.items()} | {"head": own}
    losses = fused_tdpo_loss(**mine, reduction="none").loss if len(pairs) else own.weight.sum(1)[:0]
    loss = mean_over_ranks(losses)
    loss.backward()
    average = torch.cat([own.weight.grad.flatten(), loss.detach()[None]])
    dist.all_reduce(average)
    average /= world
    near(average[:-1].view_as(own.weight), head.weight.grad, dtype, "weight")
    near(average[-1], want.detach(), dtype, "loss")


def volume(rank: int, world: int) -> None:
    """Bytes a token that a rank hands over: 32 in forward (fp32), 4 D in backward, no more after the first call."""
    call, moved = call_of(211, 3, torch.bfloat16), []
    head = vocab_parallel(leaf(cut(call["head"], rows_of(211, world, "even")[rank])))
    hidden = call["hidden"].clone().requires_grad_()
    tokens = (call["labels"][:, 1:] != -100).sum().item()
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    real = {name: getattr(dist, name) for name in (gather, "all_reduce", "all_to_all_single")}

    def counting(name: str):
        at = 0 if name == "all_reduce" else 1
        return lambda *args, **more: (moved.append((name, args[at].nbytes)), real[name](*args, **more))[1]

    fused_tdpo_loss(**call | {"hidden": hidden, "head": head})
    for name in real:
        setattr(dist, name, counting(name))
    dist.all_gather_object = None  # would raise
    loss = fused_tdpo_loss(**call | {"hidden": hidden, "head": head}).loss
    assert moved == [(gather, 32 * tokens)]
    loss.backward()
    assert moved[1:] == [("all_reduce", 4 * D * tokens)]


def refusals(rank: int, world: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    V = 37
    call, mesh = call_of(V, 3, torch.float32), init_device_mesh("cpu", (world,))
    part = cut(call["head"], rows_of(V, world, "even")[rank])
    head = vocab_parallel(part)
    for placement in (Shard(1), Replicate()):
        with pytest.raises(ValueError, match=r"^head.weight: got placements .*, wanted \(Shard\(dim=0\),\)"):
            vocab_parallel(distribute_tensor(call["head"].weight, mesh, [placement]))
    with pytest.raises(TypeError, match="DTensor"):  # FSDP's look alike: nobody takes one for a split vocabulary
        token_stats(**call | {"head": distribute_tensor(call["head"].weight, mesh, [Shard(0)])})
    with pytest.raises(ValueError, match="^head: got a whole head with a vocabulary-parallel ref_head"):
        token_stats(**call | {"ref_head": vocab_parallel(cut(call["ref_head"], rows_of(V, world, "even")[rank]))})
    with pytest.raises(ValueError, match=f"^ref_head.weight: .*V = {V}; wanted V = {V - 1}"):
        token_stats(**call | {"head": vocab_parallel(part, vocab_size=V - 1)})
    with pytest.raises(ValueError, match=f"^vocab_size: got int {V + 1}, wanted an int from 1 to {V}"):
        vocab_parallel(part, vocab_size=V + 1)
    with pytest.raises(ValueError, match=f"^labels: .* outside .0, {V}"):
        token_stats(**call | {"head": head, "labels": call["labels"].clone().fill_(V)})
    other = torch.where(call["labels"] < 0, -100, (call["labels"] + rank) % V)
    with pytest.raises(ValueError, match="^labels: .* ranks of the head's group have .*, wanted the same"):
        token_stats(**call | {"head": head, "labels": other})
    with pytest.raises(ValueError, match="^head.weight: D: .*, wanted the same"):
        vocab_parallel(call["head"].weight[:, : D - (rank == 0)])


@pytest.mark.parametrize("worker", (tensor_parallel_layers, sequences, shares, volume, refusals))
@pytest.mark.parametrize("world", WORLDS)
def test_ranks(worker, world: int):
    run(worker, world, world=world)


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
