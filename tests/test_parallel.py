"""Vocabularies, sequences and batches over gloo processes, each against one process that has everything."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.distributed as dist
from processes import run
from runnable import runnable
from splitting import CUTS, cut, rows_of
from torch import Tensor, nn

from tdpo_kernels import LMHead, TDPOOutput, TokenStats, fused_tdpo_loss, token_stats
from tdpo_kernels.backends import sharded
from tdpo_kernels.parallel import mean_over_ranks, sequence_parallel_loss, vocab_parallel

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")

P, L, D, E = 3, 7, 8, 6
WORLDS = (2, pytest.param(4, marks=pytest.mark.long))
EXTRAS = ("entropy", "mean_logit", "is_argmax")


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
    if hard == "ruled out by policy":
        bias[: V // 2] = -torch.inf
    if hard == "softcap":
        options["softcap"] = 5.0
    labels = torch.randint(V // 2 if "ruled out" in hard else 0, V, (2 * P, L), generator=g)
    labels[0, :4] = labels[P, 5:] = -100
    tensors = (x, weight, bias, ref, ref_weight, ref_bias)
    x, weight, bias, ref, ref_weight, ref_bias = (t.to(dtype) for t in tensors)
    head, ref_head = LMHead(weight, bias, **options), LMHead(ref_weight, ref_bias, **ref_options)
    return dict(hidden=x, head=head, ref_hidden=ref, ref_head=ref_head, labels=labels)


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


def near(got: Tensor, want: Tensor, what: str) -> None:
    """In float64, within some roundings of the largest entry."""
    assert got.dtype == want.dtype == torch.float64 and got.shape == want.shape, what
    finite = torch.isfinite(want)
    assert torch.equal(got[~finite], want[~finite]), what
    scale, error = (x[finite].abs().max().item() if finite.any() else 0.0 for x in (want, got - want))
    assert error <= 64 * torch.finfo(want.dtype).eps * scale + 1e-300, f"{what}: {error:.2e} of {scale:.2e}"


VOCABULARIES = [
    *[(37, how, "") for how in CUTS],
    *[(37, "chunk", hard) for hard in ("peaked", "equal", "offset", "softcap")],
    *[(37, "even", hard) for hard in ("ruled out", "ruled out by policy")],  # all that the first of two ranks has
    (5, "chunk", ""),  # four ranks hold 2, 2, 1 and 0
]


def vocabularies(rank: int, world: int, backends: list[str]) -> None:
    """Values, extras and gradients in float64; `test_parallel_laws` has the other dtypes, and harder cases."""
    for backend, budget, (V, how, hard) in product(backends, (0, 2**20), VOCABULARIES):
        for reference in ("alike", "whole", "elsewhere"):
            _a_vocabulary(rank, world, backend, V, how, hard, budget, reference)


def _a_vocabulary(
    rank: int, world: int, backend: str, V: int, how: str, hard: str, budget: int, reference: str
) -> None:
    call = call_of(V, 3, torch.float64, hard)
    options = dict(backend=backend, memory_budget=budget)
    want, want_grads = evaluated(call, leaf(call["head"]), **options)
    mine, other = rows_of(V, world, how)[rank], rows_of(V, world, "one" if how == "even" else "even")[rank]
    head = vocab_parallel(cut(leaf(call["head"]), mine))
    parts = {"whole": call["ref_head"], "alike": mine, "elsewhere": other}[reference]
    ref_head = parts if isinstance(parts, LMHead) else vocab_parallel(cut(call["ref_head"], parts))
    got, grads = evaluated(call | {"ref_head": ref_head}, head, **options)
    what = f"{backend} V={V} {how} {hard} {budget} {reference} of {world}"
    for name in ("logp", "ref_logp", "kl"):
        near(getattr(got, name), getattr(want, name), f"{what}: {name}")
    for name in EXTRAS:
        near(got.extras[name], want.extras[name], f"{what}: {name}")
    if hard == "equal":
        assert not got.kl.any(), what
    wanted = [want_grads[0], want_grads[1][mine], want_grads[2][mine]]
    for name, a, b in zip(("hidden", "weight", "bias"), grads, wanted, strict=True):
        near(a, b, f"{what}: {name}")


@pytest.mark.parametrize("world", WORLDS)
def test_a_split_vocabulary_gives_what_a_whole_one_does(world: int):
    run(vocabularies, world, runnable("cpu", torch.float64), world=world)


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
    near(loss.detach(), single.detach(), "loss")
    for a, b in ((hidden, other), (sharded.weight, alone.weight), (sharded.bias, alone.bias)):
        near(a.grad.full_tensor() if hasattr(a.grad, "full_tensor") else a.grad, b.grad, "gradient")

    step = -(-V // world) + 3  # padded to `step` rows a rank, with what would be most likely of all

    def step_of(x: Tensor) -> Tensor:
        return fused_tdpo_loss(**call | {"hidden": 2 * x, "head": vocab_parallel(sharded)}).loss

    near(torch.compile(step_of, backend="eager")(hidden), step_of(hidden), "loss, compiled")
    rows = cut(call["head"], rows_of(V, world, "chunk")[rank])
    ours = torch.compile(
        lambda x: token_stats(**call | {"hidden": x, "head": vocab_parallel(rows)}).kl, backend="eager"
    )
    near(ours(call["hidden"]), want.kl.detach(), "kl, compiled")
    padded = LMHead(*(torch.cat([x, x.new_full((step * world - V, *x.shape[1:]), 9.0)]) for x in tensors))
    whole = leaf(padded)
    head = vocab_parallel(cut(whole, slice(step * rank, step * (rank + 1))), vocab_size=V)
    assert sum(head.sizes) == head.vocab == V
    got, grads = evaluated(call, head)
    near(got.kl, want.kl, "kl without padding")
    near(grads[0], want_grads[0], "hidden without padding")


def shifted(labels: Tensor) -> Tensor:
    """Labels where they are predicted: what a sequence that is cut needs, as its next token may lie elsewhere."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)


def meshes(rank: int, world: int) -> None:
    """Pairs, tokens and columns over every mesh of so many ranks, ragged along each of its dimensions."""
    from torch.distributed.tensor import init_device_mesh

    call = call_of(23, 7, torch.float64)
    shapes = [(d, s, world // (d * s)) for d in (1, 2) for s in (1, 2, 4) if world % (d * s) == 0]
    for shape in shapes if world < 8 else [(2, 2, 2)]:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "sequence", "vocabulary"))
        for options in (dict(variant="tdpo1"), dict(alpha=0.3)):
            head, hidden = leaf(call["head"]), call["hidden"].clone().requires_grad_()
            single = fused_tdpo_loss(**call | {"hidden": hidden, "head": head}, reduction="none", **options)
            single.loss.mean().backward()
            _on_a_mesh(mesh, call, single, hidden.grad, head.weight.grad, options)


def _on_a_mesh(mesh, call: dict, single: TDPOOutput, dh: Tensor, dw: Tensor, options: dict) -> None:
    (data, sequence, vocabulary), (d, s, v) = (mesh[name] for name in mesh.mesh_dim_names), mesh.shape
    pairs = torch.arange(P)[data.get_local_rank() :: d]
    rows, labels = torch.cat([pairs, pairs + P]), shifted(call["labels"])
    where = torch.randint(0, s, labels.shape, generator=torch.Generator().manual_seed(1))[rows]
    at = (where == sequence.get_local_rank()).flatten().nonzero()[:, 0]  # of this rank's rows, flat

    def mine(x: Tensor) -> Tensor:
        return x[rows].flatten(0, 1)[at].clone()

    own, hidden, ids = leaf(call["head"]), mine(call["hidden"]).requires_grad_(), torch.arange(len(rows))
    part = vocab_parallel(cut(own, rows_of(23, v, "chunk")[vocabulary.get_local_rank()]), vocabulary.get_group())
    stats = token_stats(hidden, part, mine(call["ref_hidden"]), call["ref_head"], mine(labels), shift=False)
    ids = ids.repeat_interleave(L)[at]
    out = sequence_parallel_loss(stats, ids, len(pairs), sequence.get_group(), reduction="none", **options)
    what = f"{d} x {s} x {v}, {options}:"
    for name in vars(single):
        near(getattr(out, name).detach(), getattr(single, name).detach()[pairs], f"{what} {name}")
    mean_over_ranks(out.loss, data.get_group()).backward()
    near(hidden.grad, d * mine(dh), f"{what} hidden")
    dist.all_reduce(own.weight.grad)
    near(own.weight.grad, d * dw, f"{what} weight")


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
    near(average[:-1].view_as(own.weight), head.weight.grad, "weight")
    near(average[-1], want.detach(), "loss")


def volume(rank: int, world: int) -> None:
    """Bytes that a rank hands over, on every call but a group's first: 32 a token in forward (fp32), 4 D in backward,
    unrounded; the rows of a reference that is split elsewhere, each time; 48 P + 8 for sequences."""
    V, moved, summed = 211, [], []
    call, mine, other = call_of(V, 3, torch.bfloat16), rows_of(V, world, "even")[rank], rows_of(V, world, "one")[rank]
    head, hidden = vocab_parallel(leaf(cut(call["head"], mine))), call["hidden"].clone().requires_grad_()
    alike, elsewhere = (vocab_parallel(cut(call["ref_head"], x)) for x in (mine, other))
    tokens = (call["labels"][:, 1:] != -100).sum().item()
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    real = {name: getattr(dist, name) for name in (gather, "all_reduce", "all_to_all_single")}

    def counting(name: str):
        def counted(*args, **more):
            moved.append((name, args[0 if name == "all_reduce" else 1].nbytes))
            summed.extend([args[0].clone()] if name == "all_reduce" else [])
            return real[name](*args, **more)

        return counted

    fused_tdpo_loss(**call | {"hidden": hidden, "head": head})
    for name in real:
        setattr(dist, name, counting(name))
    dist.all_gather_object = None  # would raise
    exchange = [("all_to_all_single", size * len(call["ref_head"].weight[other])) for size in (2 * E, 2)]
    for backend, budget in product(runnable("cpu", torch.bfloat16), (0, 2**40)):
        for ref_head, exchanged in ((call["ref_head"], []), (alike, []), (elsewhere, exchange)):
            options = dict(ref_head=ref_head, hidden=hidden, head=head)
            loss = fused_tdpo_loss(**call | options, backend=backend, memory_budget=budget).loss
            assert moved == [*exchanged, (gather, 32 * tokens)]
            moved.clear()
            loss.backward()
            assert moved == [*exchanged, ("all_reduce", 4 * D * tokens)]
            assert (summed[-1] != summed[-1].bfloat16()).float().mean() > 0.9, f"{backend}, {budget}: dh was rounded"
            moved.clear()
    zero = torch.zeros(call["labels"].shape)
    ids = torch.arange(2 * P)[:, None].expand(-1, L)
    sequence_parallel_loss(TokenStats(zero, zero, zero), ids, P)
    assert moved == [("all_reduce", 48 * P + 8)]


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
    changes = {
        "labels: a checksum": {"labels": other},
        "labels: how many count": {"labels": torch.where(torch.arange(L) < rank + 3, -100, call["labels"])},
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
    ids[1, 2] = 2 * P if rank == 0 else 0
    with pytest.raises(ValueError, match=rf"^sequence_ids: got 1 outside \[0, {2 * P}\) where labels count"):
        sequence_parallel_loss(stats, ids, P)
    assert not sharded._agreed


def masses_nearly_alike(rank: int, world: int) -> None:
    """What ranks differ by in mass is not had from a difference: logits here are exact, so only that can cancel."""
    V, shift, g = 40, 2.0**-16, torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(n, generator=g).mul(4).round() / 4 for n in ((2, 16, D), (V, D), (V,)))
    labels, mine = torch.randint(V, (2, 16), generator=g), rows_of(V, world, "even")[rank]
    ref_bias = bias + shift * (torch.arange(V) < V // 2)
    got, want = (
        _kl_gradient(x.to(dtype), *(whole(LMHead(weight.to(dtype) / 2, b.to(dtype))) for b in (bias, ref_bias)), labels)
        for dtype, whole in (
            (torch.float32, lambda head: vocab_parallel(cut(head, mine))), (torch.float64, lambda head: head))
    )  # fmt: skip
    assert (got - want).norm() <= 1e-6 * want.norm()


def _kl_gradient(x: Tensor, head: LMHead, ref_head: LMHead, labels: Tensor) -> Tensor:
    hidden = x.clone().requires_grad_()
    stats = token_stats(hidden, head, x, ref_head, labels, shift=False)
    return torch.autograd.grad(stats.kl.sum(), hidden)[0].double()


@pytest.mark.parametrize("worker", (tensor_parallel_layers, masses_nearly_alike, meshes, shares, volume, refusals))
@pytest.mark.parametrize("world", WORLDS)
def test_ranks(worker, world: int):
    run(worker, world, world=world)


@pytest.mark.long
def test_eight_ranks():
    run(meshes, 8, world=8)


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
