"""Entropy, mean logit and argmax of the policy, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from batches import EXTRAS, close, ragged_batch
from runnable import backends
from torch import Tensor

from tdpo_kernels import LMHead, fused_tdpo_loss, reference, token_stats

pytestmark = pytest.mark.usefixtures("tiles_of_5_by_16")


@backends
def test_extras_are_the_reference_s(backend: str):
    call = ragged_batch()
    call["labels"][0, 5] = int((call["hidden"][0, 4] @ call["head"].T).argmax())
    z = reference.logits(call["hidden"][:, :-1].flatten(0, 1).detach(), LMHead(call["head"]), torch.float64)
    labels = call["labels"][:, 1:]
    want = reference.extra_statistics(z, labels.clamp(min=0).flatten())
    assert want["is_argmax"][4] == 1
    for names in (EXTRAS, EXTRAS[::-1], EXTRAS[:1], ["is_argmax"], ()):
        got = token_stats(**call, extras=names, backend=backend).extras
        assert list(got) == list(names)
        for name in names:
            assert not got[name][:, 0].any()
            close(got[name][:, 1:], torch.where(labels != -100, want[name].view_as(labels), 0.0))


@backends
def test_extras_change_nothing_else(backend: str):
    call = ragged_batch(torch.float32)
    plain, more = (token_stats(**call, extras=x, backend=backend) for x in ((), EXTRAS))
    assert all(torch.equal(getattr(plain, f), getattr(more, f)) for f in ("logp", "ref_logp", "kl"))


@backends
@pytest.mark.parametrize("frozen", [False, True])
def test_the_loss_hands_out_the_statistics_of_its_tokens(backend: str, frozen: bool):
    call = ragged_batch(torch.float32)
    call["head"].requires_grad_(not frozen)
    want = token_stats(**call, extras=EXTRAS, backend=backend)
    found = fused_tdpo_loss(**call, extras=EXTRAS, backend=backend).tokens
    assert [torch.equal(getattr(found, f), getattr(want, f)) for f in ("logp", "ref_logp", "kl")] == [True] * 3
    assert list(found.extras) == list(EXTRAS)
    assert all(torch.equal(found.extras[name], want.extras[name]) for name in EXTRAS)


def of_one_row(z: Tensor, bias: Tensor | None, backend: str) -> dict[str, float]:
    """Return the extras of one row of logits, whose label is token 0, in fp32."""
    one, head = torch.ones(1, 1, 1), LMHead(z[:, None], bias)
    found = token_stats(
        one, head, one, z[:, None], torch.zeros(1, 1).long(), shift=False, extras=EXTRAS, backend=backend
    )
    return {name: x.item() for name, x in found.extras.items()}


@backends
@pytest.mark.parametrize("out", [1, 20, 63])
def test_mean_logit_with_one_token_ruled_out_is_minus_infinity(backend: str, out: int):
    """Whatever its share: a large negative number over 64 is no -inf. The others do as if it were not there."""
    z, bias = torch.linspace(-2, 2, 64), torch.zeros(64)
    bias[out] = -math.inf
    found = of_one_row(z, bias, backend)
    rest = torch.cat([z[:out], z[out + 1 :]]).double()
    want = reference.extra_statistics(rest[None], torch.zeros(1).long())
    assert found["mean_logit"] == -math.inf and found["is_argmax"] == 0
    assert found["entropy"] == pytest.approx(want["entropy"].item(), rel=1e-6)


@backends
@pytest.mark.parametrize("top", [10.0, 1e4, 1e7])
@pytest.mark.parametrize("at", [0, 40])
def test_mean_logit_keeps_its_digits_under_one_very_high_logit(backend: str, top: float, at: int):
    """And the entropy of the sure row is none, not a rounding."""
    z = torch.linspace(-2, 3, 64)
    z[at] = top
    found, want = of_one_row(z, None, backend), reference.extra_statistics(z.double()[None], torch.zeros(1).long())
    assert abs(found["mean_logit"] - want["mean_logit"].item()) <= 1e-6 * z.abs().mean().item()
    assert found["is_argmax"] == (at == 0)
    assert found["entropy"] == pytest.approx(want["entropy"].item(), rel=1e-4, abs=1e-30)
