"""The KL to three digits in fp32, from 1e-7 nats, where every run starts, to 60, whatever the models' offset."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, base
from closeness import exact, stats_of, truth

NATS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-2, 1.0, 10.0, 30.0, 60.0)


def apart_by(nats: float, offset: float, V: int = 211) -> Case:
    """Logits of size 1; the reference differs by a constant and by a bias that makes the mean KL `nats`."""
    case = replace(base(50, L=16, V=V, apart=0.0, ignored=0.0), shift=False)
    if nats < 2.0:
        g = torch.Generator().manual_seed(51)
        return _scaled(case, torch.randn(V, generator=g, dtype=torch.float64), nats, offset)
    one_token = torch.zeros(V, dtype=torch.float64)
    one_token[V - 5] = -1.0  # the policy grows sure of one token
    return _scaled(case, one_token, nats, offset)


def _scaled(case: Case, direction: torch.Tensor, nats: float, offset: float) -> Case:
    low, high = 0.0, 200.0
    for _ in range(60):
        middle = (low + high) / 2
        kl = _mean_kl(case, direction * middle)
        low, high = (middle, high) if kl < nats else (low, middle)
    return replace(case, bias=-direction * low, ref_bias=torch.full_like(direction, offset))


def _mean_kl(case: Case, bias: torch.Tensor) -> float:
    z = case.hidden.flatten(0, 1) @ case.weight.T
    log_p, log_q = (z - bias).log_softmax(-1), z.log_softmax(-1)
    return float((log_q.exp() * (log_q - log_p)).sum(-1).mean())


def relative_error(case: Case, backend: str, budget: int = 0) -> float:
    problem = case.problem(torch.float32)
    want = truth(problem, (None, None)).result.kl
    have = exact(stats_of(problem, backend, budget).kl.flatten()[problem.rows()[0]])
    return float((abs(have - want) / want).max())


@pytest.mark.parametrize("offset", (0.0, 5.0, -50.0))
@pytest.mark.parametrize("nats", NATS)
def test_kl_has_three_digits(nats, offset, backend, small_tiles):
    if abs(offset) * 2**-24 > 3e-4 * nats**0.5:
        pytest.skip("the rounding of the logits alone costs more than three digits")
    assert relative_error(apart_by(nats, offset), backend) <= 1e-3


@pytest.mark.parametrize("nats", NATS)
def test_kl_has_three_digits_in_one_tile(nats, backend, small_tiles):
    small_tiles(512, 2048)
    assert relative_error(apart_by(nats, 0.0), backend) <= 1e-3


@pytest.mark.parametrize("nats", (61.0, 79.0, 81.0, 150.0))
def test_kl_beyond_exp_stays_accurate(nats, backend, small_tiles):
    """Above 60 nats the KL is mu + L - L', which no longer cancels."""
    assert relative_error(apart_by(nats, 5.0), backend) <= 1e-5


def test_problems_have_the_kl_they_are_named_after():
    for nats in NATS:
        kl = truth(apart_by(nats, 0.0).problem(torch.float64), (None, None)).result.kl.mean()
        assert abs(float(kl) / nats - 1) < 1e-6
