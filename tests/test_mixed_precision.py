"""Gradients under autocast and of 16-bit inputs, and cotangents too small or too large for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from batches import EVERYTHING, batch, grads
from runnable import backends
from torch import Tensor

from tdpo_kernels import TokenStats, fused_tdpo_loss, reference, token_stats
from tdpo_kernels.loss import Terms, preference_loss


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def plain_tdpo2(call: dict) -> Tensor:
    """The loss of logits that `F.linear` makes, as people write it: widened to at least fp32 after the product."""
    logits = [F.linear(call[h], call[w]) for h, w in (("hidden", "head"), ("ref_hidden", "ref_head"))]
    wide = [(x if x.dtype == torch.float64 else x.float()).flatten(0, 1) for x in logits]
    logp, ref_logp, kl = (x.view_as(call["labels"]) for x in reference.statistics(*wide, call["labels"].flatten()))
    return preference_loss(TokenStats(logp, ref_logp, kl), Terms(0.1, 0.5, "tdpo2"), "mean").loss


FLOATS = ("hidden", "head", "ref_hidden", "ref_head")
PRECISIONS = {
    "fp32 hidden, fp32 head": (torch.float32, torch.float32),
    "bf16 hidden, fp32 head": (torch.bfloat16, torch.float32),
    "fp32 hidden, bf16 head": (torch.float32, torch.bfloat16),
    "bf16 hidden, bf16 head": (torch.bfloat16, torch.bfloat16),
}


def mixed(dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[dict, dict]:
    """A call in `dtypes`, and the same values, rounded to bf16, in float64."""
    call = batch(torch.float64, length=6, D=16, V=97)
    call |= {n: (call[n] * 0.6).detach().to(dtypes["head" in n]) for n in FLOATS}
    exact = call | {n: call[n].bfloat16().double() for n in FLOATS}
    for each in (call, exact):
        each["hidden"].requires_grad_(), each["head"].requires_grad_()
    return call, exact


@backends
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("dtypes", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("budget", [0, EVERYTHING])
def test_autocast_is_f_linear_s(backend: str, inside: bool, dtypes: tuple, budget: int):
    call, exact = mixed(dtypes)
    leaves = call["hidden"], call["head"]
    results, options = [], dict(backend=backend, memory_budget=budget)
    for function in (lambda: fused_tdpo_loss(**call, **options).loss, lambda: plain_tdpo2(call)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = function()
            got = grads(loss, *leaves) if inside else None
        results.append([loss, *(got or grads(loss, *leaves))])
    truth = plain_tdpo2(exact)
    truth = [truth, *grads(truth, exact["hidden"], exact["head"])]
    for ours, plain, true in zip(*results, truth, strict=True):
        assert ours.dtype == plain.dtype
        assert relative(ours, true) <= 2 * relative(plain, true) + 4e-3


def test_autocast_leaves_float64_alone():
    call = batch()
    want = fused_tdpo_loss(**call).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused_tdpo_loss(**call).loss, want)


@backends
def test_autocast_rounds_operands_to_its_dtype(backend: str):
    """fp32 operands are rounded, not the logits: the statistics are those of the rounded operands to fp32 accuracy."""
    call, exact = mixed((torch.float32, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        got = token_stats(**call, backend=backend)
    want = token_stats(**exact, backend="naive")
    assert relative(got.logp, want.logp) < 1e-6 and relative(got.kl, want.kl) < 1e-5
    assert relative(token_stats(**call, backend=backend).logp, want.logp) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("budget", [0, EVERYTHING])
def test_tiny_cotangents_do_not_underflow(dtype: torch.dtype, budget: int):
    """Every row of W carries the same large number, so dh cancels only if the small entries of dz are all there."""
    call = batch(dtype, length=4, D=4, V=4096)
    weight = call["head"].detach().float() * 0.1
    weight[:, 0] = 16.0
    head, hidden = weight.to(dtype).requires_grad_(), (call["hidden"].detach() * 0.1).requires_grad_()
    ref = {"ref_hidden": call["ref_hidden"] * 0.1, "ref_head": call["ref_head"] * 0.1}
    stats = token_stats(**call | ref | {"head": head, "hidden": hidden}, memory_budget=budget)
    for scale in (1.0, 2.0**-13):
        (g,) = torch.autograd.grad((stats.logp * scale).sum(), hidden, retain_graph=True)
        assert g[..., 0].abs().max() <= 0.02 * 16.0 * scale


@pytest.mark.parametrize("scale", [1e-30, 1e-36, 1e-42])
def test_fp16_cotangents_that_vanish_make_gradients_that_do(scale: float):
    """The power of two that lifts them is itself a number of fp32."""
    call = batch(torch.float16, length=4, D=4, V=50)
    g = torch.autograd.grad((token_stats(**call).logp * scale).sum(), (call["hidden"], call["head"]))
    assert not any(x.any() for x in g)


def test_a_row_that_is_not_finite_leaves_other_rows_their_fp16_scale():
    call = batch(torch.float16, length=4, D=4, V=50)
    cotangents = torch.full(call["labels"].shape, 1e-6)
    (want,) = torch.autograd.grad(token_stats(**call).logp, call["hidden"], cotangents)
    cotangents[0, 0] = torch.inf
    (got,) = torch.autograd.grad(token_stats(**call).logp, call["hidden"], cotangents)
    assert torch.equal(got[1:], want[1:]) and want[1:].any()


def test_huge_fp16_cotangents_do_not_overflow():
    call = batch(torch.float16, length=4, D=4, V=50)
    stats = token_stats(**call)
    (g,) = torch.autograd.grad((stats.logp * 2.0**15).sum() * 2.0**-3, call["hidden"], retain_graph=True)
    (unit,) = torch.autograd.grad(stats.logp.sum(), call["hidden"])
    assert g.isfinite().all()
    torch.testing.assert_close(g.float() / 2.0**12, unit.float(), rtol=1e-2, atol=1e-3)
