"""Hold law 2 at equality: KL and its gradient exactly 0, loss exactly log 2; and what a bias of -inf rules out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import CASES, DTYPES, Case, base, bias_of, cotangents
from closeness import dtype_id, leaves, same_bits, stats_of
from runnable import mainly
from torch import Tensor

from tdpo_kernels import TokenStats, fused_tdpo_loss

T, V = 16, 1025


EQUAL = {
    "scaled": lambda: base(40, apart=0.0),
    "peaked": lambda: base(41, apart=0.0, std=30.0),
    "softcap": lambda: replace(base(42, apart=0.0), options=dict(softcap=4.0), ref_options=dict(softcap=4.0)),
    "bias": lambda: with_biases(base(43, apart=0.0), bias_of(base(43), size=30.0)),
    "ruled_out": lambda: with_biases(base(44, apart=0.0), every_tenth_ruled_out(base(44))),
}


def with_biases(case: Case, bias: Tensor) -> Case:
    labels = torch.where(case.labels == -100, -100, case.labels // 10 * 10 + 1)
    return replace(case, bias=bias, ref_bias=bias.clone(), labels=labels.clamp(max=201))


def every_tenth_ruled_out(case: Case) -> Tensor:
    bias = bias_of(case)
    bias[::10] = -math.inf
    bias[64:128] = -math.inf
    bias[1::10] = 0.5
    return bias


def kl_gradients(problem, backend: str, budget: int = 0) -> tuple[TokenStats, list[Tensor]]:
    live, parts = leaves(problem)
    out = stats_of(live, backend, budget)
    g_kl = cotangents("general", live.labels)[1].to(out.kl.dtype)
    return out, list(torch.autograd.grad(out.kl, parts, g_kl))


@pytest.mark.parametrize("dtype", mainly((torch.float16,), DTYPES), ids=dtype_id)
@pytest.mark.parametrize("case", mainly(("bias",), EQUAL))
def test_policy_equal_to_reference_gives_exactly_zero(case, dtype, backend, small_tiles):
    """The KL and its gradient exactly, tokens too unlikely for fp32 to hold included."""
    for budget in (0, 2**40):
        out, grads = kl_gradients(EQUAL[case]().problem(dtype), backend, budget)
        assert same_bits([out.kl, out.logp], [torch.zeros_like(out.kl), out.ref_logp])
        assert max(float(g.abs().max()) for g in grads) == 0.0


def misaligned(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "a slice of wider rows": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every second column": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "every second row": lambda x: torch.stack([x, x], -2).flatten(-3, -2)[..., ::2, :],
    "no multiple of 16 bytes": misaligned,
}


@pytest.mark.parametrize("dtype", mainly((torch.float16,), DTYPES), ids=dtype_id)
@pytest.mark.parametrize("layout", mainly(("transposed", "no multiple of 16 bytes"), LAYOUTS))
def test_equality_is_of_numbers_not_of_layouts(layout, dtype, backend, small_tiles):
    """The reference's numbers are the policy's, and lie otherwise in memory. Exactly zero wherever a library's product
    has the same bits of both, as it has on the CPUs known; no more than that product's rounding elsewhere."""
    problem, lay = base(40, apart=0.0, V=211).problem(dtype), LAYOUTS[layout]
    hidden, head = lay(problem.hidden), replace(problem.head, weight=lay(problem.head.weight))
    assert torch.equal(hidden, problem.hidden) and torch.equal(head.weight, problem.head.weight)
    out, grads = kl_gradients(replace(problem, ref_hidden=hidden, ref_head=head), backend)
    wide = problem.stats_dtype
    z, r = (h[0].to(wide) @ w.to(wide).T for h, w in ((problem.hidden, problem.head.weight), (hidden, head.weight)))
    rounding = 0.0 if torch.equal(z, r) else 16 * torch.finfo(wide).eps * float(z.abs().max())
    assert out.kl.max().item() <= rounding**2 and (rounding or same_bits([out.logp], [out.ref_logp]))
    assert all(float(g.abs().max()) <= rounding * float(problem.hidden.abs().max()) * T for g in grads)


@pytest.mark.parametrize("variant, alpha", [("tdpo1", None), ("tdpo2", None), ("tdpo2", 0.0)])
@pytest.mark.parametrize("dtype", mainly((torch.float32,), DTYPES), ids=dtype_id)
def test_policy_equal_to_reference_gives_exactly_log_2(dtype, variant, alpha, backend, small_tiles):
    out = loss_of(base(45, B=4, apart=0.0).problem(dtype), backend, variant=variant, alpha=alpha)
    assert out.loss.item() == torch.tensor(2.0, dtype=out.loss.dtype).log().item()


def loss_of(problem, backend: str, **options):
    return fused_tdpo_loss(
        problem.hidden, problem.head, problem.ref_hidden, problem.ref_head, problem.labels, backend=backend, **options
    )


# --- what a bias of -inf rules out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", mainly((torch.float16,), DTYPES), ids=dtype_id)
@pytest.mark.parametrize("name", mainly(("ruled_out_capped",), ("ruled_out", "ruled_out_capped")))
def test_a_token_both_models_rule_out_gets_no_gradient(name, dtype, backend, small_tiles):
    """Not even a tiny one: padded rows of a vocabulary must not drift."""
    case = CASES[name]()
    for budget in (0, 2**40):
        _, (_, weight, bias) = kl_gradients(case.problem(dtype), backend, budget)
        out = torch.isneginf(case.bias)
        assert not weight[out].count_nonzero() and not bias[out].count_nonzero()


@pytest.mark.parametrize("dtype", mainly((torch.float16,), DTYPES), ids=dtype_id)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"logit_scale": -0.5}], ids=str)
def test_kl_is_infinite_where_the_policy_alone_rules_out_a_token(options, dtype, backend, small_tiles):
    """However little the reference thinks of it, and whatever the policy's scale and softcap are."""
    case = replace(base(31), bias=bias_of(base(31)), ref_bias=torch.zeros(211, dtype=torch.float64), options=options)
    case.bias[100], case.ref_bias[100] = -math.inf, -200.0
    problem = case.problem(dtype)
    out = stats_of(problem, backend, 0)
    counted = problem.rows()[0]
    assert torch.isposinf(out.kl.flatten()[counted]).all() and torch.isfinite(out.ref_logp).all()
