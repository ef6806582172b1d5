"""Vocabularies, sequences and batches over gloo processes, each against one process that has everything."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.distributed as dist
from processes import run
from runnable import runnable
from splitting import CUTS, EXTRAS, D, E, L, P, call_of, cut, evaluated, leaf, near, rows_of
from torch import Tensor

from tdpo_kernels import LMHead, TDPOOutput, TokenStats, fused_tdpo_loss, token_stats
from tdpo_kernels.parallel import mean_over_ranks, sequence_parallel_loss, vocab_parallel

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")

WORLDS = (2, pytest.param(4, marks=pytest.mark.long))
VOCABULARIES = [
    *[(37, how, "") for how in CUTS],
    (37, "chunk", "equal"),
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
    """Take what torch's tensor parallelism makes of an LM head, gradients and all, and rows that are padding."""
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
    for name in vars(single).keys() - {"tokens"}:
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
            size = args[0 if name == "all_reduce" else 1].nbytes
            if name != "all_reduce" or size > 8:  # two yes or no
                moved.append((name, size))
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


def masses_nearly_alike(rank: int, world: int) -> None:
    """Make ranks' masses differ by less than their difference would hold. Logits are exact, so only that can cancel."""
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


@pytest.mark.parametrize("worker", (tensor_parallel_layers, masses_nearly_alike, meshes, shares, volume))
@pytest.mark.parametrize("world", WORLDS)
def test_ranks(worker, world: int):
    run(worker, world, world=world)


@pytest.mark.long
def test_eight_ranks():
    run(meshes, 8, world=8)
