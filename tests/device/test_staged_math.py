"""What forward stages of a tile, p and the log-ratio: to its rounding, and with what rounding took made up for."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from harness import EPS, F32, KINDS, check_all, close, every_kind, exact_rows, launch, padded, row
from math_launches import F, exponent, softmax, staged, weigh

from tdpo_kernels.backends.tile_math import LOWEST
from tdpo_kernels.device import math as device


@triton.jit
def _made_up(p, q, exact_t, kept_p, t, label, out, R: tl.constexpr, C: tl.constexpr):
    at = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    is_label = tl.arange(0, C)[None, :] == tl.load(label + tl.arange(0, R))[:, None]
    p, q, exact_t, kept_p, t = (
        tl.load(p + at),
        tl.load(q + at),
        tl.load(exact_t + at),
        tl.load(kept_p + at),
        tl.load(t + at),
    )
    factor, more = device.made_up(p, q, exact_t, kept_p, t, is_label)
    tl.store(out + tl.arange(0, R), factor)
    tl.store(out + R + tl.arange(0, R), more)


@pytest.mark.parametrize("apart", (0.0, 1e-3, 0.5, 3.0))
@pytest.mark.parametrize("label", (0, 5, 31, -7, 40))
def test_made_up_gives_sums_back_what_rounding_took(apart, label):
    """Of the entries but the label's, which may be elsewhere. Equal models stay equal."""
    g = torch.Generator().manual_seed(3)
    z = torch.randn(8, 32, generator=g)
    r = z + apart * torch.randn(8, 32, generator=g)
    p, q, exact_t = z.softmax(1), r.softmax(1), z.log_softmax(1) - r.log_softmax(1)
    t = exact_t.bfloat16().float()
    kept_p = (q * t.clamp(max=0).exp() + (p - q).clamp(min=0)).bfloat16().float()
    labels, out = torch.full((8,), label), torch.full((2, 8), math.nan)
    launch(_made_up, (1,), p, q, exact_t, kept_p, t, labels, out, 8, 32)
    others = (torch.arange(32) != label).double()
    sum_p, sum_q = (p.double() * others).sum(1), (q.double() * others).sum(1)
    made_p = kept_p.double() * out[0, :, None].double() * others
    made_q = made_p * torch.exp(-(t + out[1, :, None]).double())
    assert ((made_p.sum(1) - sum_p).abs() <= 8 * EPS * sum_p).all()
    assert ((made_q.sum(1) - sum_q).abs() <= 16 * EPS * sum_q).all()
    assert apart or not out[1].count_nonzero()


@pytest.mark.parametrize("gap", (0.0, 70.0, 104.0, 300.0))
def test_t_is_the_log_ratio_within_the_part(gap):
    z, r = every_kind()
    z[:, 9] -= gap
    _, found = staged(z, r)
    for i in range(len(z)):
        t = row(z[i], r[i])
        for v in range(24):
            if t.log_q[v] == -math.inf or t.log_p[v] == -math.inf:
                continue
            want = max(t.log_p[v] - t.log_q[v], -F)
            size = abs(float(z[i, v])) + abs(float(r[i, v])) + abs(t.m_z) + abs(t.m_r) + t.diff_scale
            assert close(found[i, v], want, EPS, 2 * EPS * size), f"({i}, {v}): {found[i, v]}, wanted {want}"
        assert (found[i] >= torch.tensor(-F)).all()


@pytest.mark.parametrize("apart", (1e-3, 1e-2, 0.1))
@pytest.mark.parametrize("offset", (0.0, 50.0))
def test_t_keeps_its_digits_where_the_models_nearly_agree(offset, apart):
    z, r = exact_rows(apart, offset)
    _, found = staged(z, r)
    for i in range(len(z)):
        t = row(z[i], r[i])
        size = max(abs(float(z[i, v] - r[i, v]) - (t.m_z - t.m_r)) for v in range(24))
        check_all(found[i], [p - q for p, q in zip(t.log_p, t.log_q, strict=True)], lambda v, s=size: 8 * EPS * s)


@pytest.mark.parametrize("dtype", (F32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("gap", (0.0, 70.0, 104.0, 300.0))
def test_staged_pair_gives_q_even_where_p_vanishes(gap, dtype):
    """q = p e^-t: where q > p to fp32 rounding, though t is rounded; elsewhere p is p, and q within t's rounding."""
    z, r = every_kind()
    z[:, 9] -= gap
    p, t = staged(z, r, dtype)
    q = p.double() * (-t.double()).exp()
    for i in range(len(z)):
        true = row(z[i], r[i])
        for v in range(24):
            want, log_t = math.exp(true.log_q[v]), true.log_p[v] - true.log_q[v] if true.log_p[v] > -math.inf else 0.0
            if want == 0 or true.log_p[v] == -math.inf:
                continue
            bound = exponent(true, float(z[i, v]), float(r[i, v])) * EPS
            if log_t > -F and t[i, v] > 0:
                assert close(p[i, v], math.exp(true.log_p[v]), bound, 1e-37), (i, v)
            bound += F * EPS if t[i, v] <= 0 else EPS * 8 * F + (0 if dtype is F32 else math.expm1(log_t * 2**-8))
            assert close(q[i, v], want, bound, 1e-30), f"({i}, {v}): {q[i, v]}, wanted {want} to {bound}"


@pytest.mark.parametrize("size", (1e-6, 1e-3, 0.1, 3.0, 30.0))
def test_weighing_gives_q_where_q_is_the_larger_and_leaves_p_where_p_is(size):
    """Whatever rounding t has been through."""
    g = torch.Generator().manual_seed(3)
    q, t = torch.rand(200, generator=g) + 1e-3, size * torch.randn(200, generator=g)
    t.clamp_(-F, F)
    p, rounded = (q.double() * t.double().exp()).float(), t.bfloat16().float()
    weighed = weigh(p, q, rounded)[:200]
    below = rounded < 0
    found = weighed.double() * (-rounded.double()).exp()
    assert torch.allclose(found[below], q.double()[below], rtol=2 * EPS, atol=0)
    assert torch.allclose(weighed[~below], p[~below], rtol=2 * EPS, atol=0)


@pytest.mark.parametrize("which", (0, 1), ids=("p", "q"))
def test_softmax(which):
    pair = [padded(x, LOWEST) for x in every_kind(V=32)]
    true = [row(pair[0][i], pair[1][i]) for i in range(2 * len(KINDS))]
    m, lse = (padded(torch.tensor([t[k + which] for t in true]), 0.0) for k in (0, 2))
    found = softmax(pair[which], m, lse)
    for i, t in enumerate(true):
        log = (t.log_p, t.log_q)[which]
        check_all(
            found[i],
            [math.exp(x) for x in log],
            lambda v, log=log: EPS * (4 - max(log[v], -1e3)) * math.exp(log[v]) + 1e-37,
        )
