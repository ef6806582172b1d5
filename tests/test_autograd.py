"""Hold that gradients are right however the graph is used, and that values belong to who asked for them.

Budgets keep some of the tiles."""

from __future__ import annotations

import threading

import pytest
import torch
from batches import batch, grads
from runnable import backends
from torch import Tensor

from tdpo_kernels import LMHead, fused_tdpo_loss, token_stats


@pytest.fixture(autouse=True)
def _tiles(small_tiles) -> None:
    """Tiles of 3 x 16: several of them, and a short last one, in a few rows and columns."""
    small_tiles(3, 16)


# --- right gradients --------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "logit_scale": 0.6}], ids=["plain", "softcap"])
def test_token_stats_pass_gradcheck(backend: str, options: dict):
    call = batch(rows=2, length=2, D=2)
    call["labels"][1, 0] = -100
    call["labels"][1, 1] = 18
    bias = torch.randn(19, dtype=torch.float64, requires_grad=True)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        heads = {"hidden": hidden, "head": LMHead(weight, bias, **options)}
        stats = token_stats(**call | heads, backend=backend, memory_budget=1200)
        return stats.logp, stats.kl

    assert torch.autograd.gradcheck(function, (call["hidden"], call["head"], bias))


# --- how a graph is used ----------------------------------------------------------------------------------------------


@backends
def test_double_backward_is_refused(backend: str):
    call = batch()
    (g,) = torch.autograd.grad(fused_tdpo_loss(**call, backend=backend).loss, call["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.square().sum().backward()


@pytest.mark.parametrize("name", ["hidden", "head", "ref_hidden", "ref_head"])
def test_a_change_between_forward_and_backward_is_noticed(name: str):
    """Backward needs them here, and not where forward has made the gradients: `test_ways`."""
    call = batch()
    loss = fused_tdpo_loss(**call).loss
    with torch.no_grad():
        call[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_change_of_labels_does_not_matter():
    call = batch() | {"shift": True}
    want = grads(fused_tdpo_loss(**call).loss, call["hidden"])
    loss = fused_tdpo_loss(**call).loss
    call["labels"].fill_(0)
    assert torch.equal(grads(loss, call["hidden"])[0], want[0])


def test_backward_in_another_thread():
    call = batch(torch.bfloat16, length=9)
    leaves = call["hidden"], call["head"]
    want = grads(fused_tdpo_loss(**call, memory_budget=1200).loss, *leaves)
    loss = fused_tdpo_loss(**call, memory_budget=1200).loss
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert all(torch.equal(x.grad, g) for x, g in zip(leaves, want, strict=True))


def test_hooks_on_hidden_see_its_gradient_once():
    call = batch()
    seen = []
    hidden = call["hidden"] * 1.0
    hidden.register_hook(seen.append)
    fused_tdpo_loss(**call | {"hidden": hidden}).loss.backward()
    assert len(seen) == 1 and torch.equal(seen[0], call["hidden"].grad)


def test_saved_tensors_are_unpacked_once():
    """Unpacking under `save_on_cpu`, say, copies everything."""
    unpacked = []

    def unpack(x: Tensor) -> Tensor:
        unpacked.append(id(x))
        return x

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        stats = token_stats(**batch())
    (stats.logp + stats.kl).sum().backward()
    assert len(unpacked) == len(set(unpacked))


# --- what comes out belongs to who asked for it -----------------------------------------------------------------------


@backends
@pytest.mark.parametrize("shape", [(12,), (4, 3)], ids=str)
@pytest.mark.parametrize("ignored", [False, True], ids=["all rows", "some rows"])
@pytest.mark.parametrize("name", ["logp", "ref_logp", "kl", "entropy"])
def test_statistics_may_be_changed_in_place(backend: str, shape: tuple[int, ...], ignored: bool, name: str):
    """They are nobody's views, and share no memory with what backward needs."""
    call = batch()
    call |= {n: call[n].detach().view(*shape, -1) for n in ("hidden", "ref_hidden")}
    call["hidden"].requires_grad_()
    call["labels"] = call["labels"].clone().view(shape)
    if ignored:
        call["labels"].view(-1)[::3] = -100

    def gradients(change) -> list[Tensor]:
        stats = token_stats(**call, extras=("entropy",), backend=backend)
        every = dict(logp=stats.logp, ref_logp=stats.ref_logp, kl=stats.kl, **stats.extras)
        every[name] = change(every[name])
        return grads((every["logp"] - 3 * every["kl"] + every["entropy"]).sum(), call["hidden"], call["head"])

    got, want = gradients(lambda x: x.mul_(2)), gradients(lambda x: x * 2)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
