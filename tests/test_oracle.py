"""The scalar oracle, the float64 reference, the loss, and the truth the laws are judged by say the same thing."""

from __future__ import annotations

import math
from dataclasses import replace

import oracle
import pytest
import torch
from cases import CASES, cotangents
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from truth import truth

from tdpo_kernels import LMHead, TokenStats, reference
from tdpo_kernels.loss import Terms, preference_loss, sequence_sums

F64 = torch.float64


def close(found, want: float, scale: float = 1.0) -> bool:
    if math.isinf(want):
        return bool(found == want)
    have = float(found.detach() if isinstance(found, Tensor) else found)
    return abs(have - want) <= 1e-12 * max(1.0, abs(want), scale)


numbers = st.floats(-3, 3, width=32)
nasty = st.one_of(
    numbers, st.sampled_from([0.0, 1e-8, -1e-8, 50.0, -50.0, 104.0, -104.0, -300.0, 300.0, 1000.0, -1000.0, -math.inf])
)


@st.composite
def row_pairs(draw):
    """z, r and a label both models allow."""
    V = draw(st.integers(1, 9))
    z = draw(st.lists(nasty, min_size=V, max_size=V))
    apart = draw(st.one_of(st.none(), st.sampled_from([0.0, 1e-9, 1e-6, 1e-3])))
    r = draw(st.lists(nasty, min_size=V, max_size=V))
    if apart is not None:
        r = [a + apart * (i % 3) for i, a in enumerate(z)]
    label = draw(st.integers(0, V - 1))
    z[label], r[label] = (x if math.isfinite(x) else 0.5 for x in (z[label], r[label]))
    return z, r, label


@given(row_pairs())
def test_statistics_are_the_oracles(rows):
    z, r, label = rows
    values = reference.statistics(torch.tensor([z], dtype=F64), torch.tensor([r], dtype=F64), torch.tensor([label]))
    wants = oracle.logp(z, label), oracle.logp(r, label), oracle.kl(z, r)
    scale = max(abs(x) for x in (*z, *r) if math.isfinite(x))
    assert all(close(x, want, scale) for x, want in zip(values, wants, strict=True))


@given(row_pairs())
def test_kl_of_the_reference_has_relative_accuracy(rows):
    z, r, _ = rows
    want = oracle.kl(z, r)
    have = reference.forward_kl(*(torch.tensor([x], dtype=F64).log_softmax(-1) for x in (z, r))).item()
    scale = max(abs(x) for x in (*z, *r) if math.isfinite(x)) + 1
    rounding = 1e-15 * scale  # of a logit: moves the KL by its product with sqrt(KL), and by its square
    assert have == want or abs(have - want) <= 1e-9 * want + rounding**2 + rounding * math.sqrt(want)


@given(row_pairs(), st.tuples(numbers, numbers))
def test_gradient_of_the_reference_is_equation_6(rows, cotangent):
    z, r, label = rows
    if math.isinf(oracle.kl(z, r)):
        return
    x = torch.tensor([z], dtype=F64, requires_grad=True)
    logp, _, kl = reference.statistics(x, torch.tensor([r], dtype=F64), torch.tensor([label]))
    (grad,) = torch.autograd.grad((logp, kl), x, [torch.tensor([g], dtype=F64) for g in cotangent])
    want = oracle.dz(z, r, label, *cotangent)
    scale = max(abs(x) for x in (*z, *r) if math.isfinite(x))
    assert all(close(g, w, scale) for g, w in zip(grad[0], want, strict=True))
    assert abs(math.fsum(want)) <= 1e-12 * max(scale, 1.0)


@given(
    st.integers(0, 10**6), st.booleans(), st.sampled_from([1.0, 0.7, -2.0]), st.sampled_from([None, 0.5, 30.0])
)  # fmt: skip
def test_logits_are_the_oracles(seed, has_bias, scale, softcap):
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (3 * torch.randn(*shape, generator=g, dtype=F64) for shape in ((3, 5), (7, 5), (7,)))
    head = LMHead(weight, bias if has_bias else None, scale, softcap)
    want = [
        oracle.logits(h, weight.tolist(), bias.tolist() if has_bias else None, scale, softcap) for h in hidden.tolist()
    ]
    assert torch.allclose(reference.logits(hidden, head, F64), torch.tensor(want, dtype=F64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "case", ("scaled", "near_equal", "peaked_30", "offset_1000", "ruled_out", "sure_of_different_tokens", "softcap")
)
def test_truth_of_the_laws_is_the_oracle(case):
    problem = CASES[case]().problem(F64)
    cotangent = cotangents("general", problem.labels)
    true = truth(problem, cotangent)
    at, by = (x.tolist() for x in problem.rows())
    for t in (0, len(at) // 2, len(at) - 1):
        z, r = (
            oracle.logits(
                h.flatten(0, 1)[by[t]].tolist(), head.weight.tolist(),
                None if head.bias is None else head.bias.tolist(),
                head.logit_scale, head.softcap,
            )
            for h, head in ((problem.hidden, problem.head), (problem.ref_hidden, problem.ref_head))
        )  # fmt: skip
        label = int(problem.labels.flatten()[at[t]])
        scale = 1000.0 if case == "offset_1000" else 100.0
        values = true.result.logp[t], true.result.ref_logp[t], true.result.kl[t]
        wants = oracle.logp(z, label), oracle.logp(r, label), oracle.kl(z, r)
        assert all(close(x, w, scale) for x, w in zip(values, wants, strict=True))
        want = oracle.dz(z, r, label, *(float(g.flatten()[at[t]]) for g in cotangent))
        assert all(close(x, w, scale) for x, w in zip(true.dz[t], want, strict=True))


# --- the loss ---------------------------------------------------------------------------------------------------------


def random_stats(pairs: int = 3, length: int = 5, size: float = 1.0, seed: int = 0) -> TokenStats:
    g = torch.Generator().manual_seed(seed)
    logp, ref_logp = (-size * torch.rand(2 * pairs, length, generator=g, dtype=F64) for _ in range(2))
    kl = size * torch.rand(2 * pairs, length, generator=g, dtype=F64)
    return TokenStats(logp.requires_grad_(), ref_logp, kl.requires_grad_())


def run(stats: TokenStats, beta=0.1, alpha=0.5, variant="tdpo2", **options) -> tuple[Tensor, Tensor, Tensor]:
    out = preference_loss(stats, Terms(beta, alpha, variant), **{"reduction": "sum", **options})
    return out, *torch.autograd.grad(out.loss.sum(), (stats.logp, stats.kl), materialize_grads=True)


@given(
    seed=st.integers(0, 10**6), size=st.sampled_from([0.0, 0.1, 3.0, 400.0]), beta=st.sampled_from([0.01, 0.1, 2.0]),
    alpha=st.sampled_from([0.0, 0.5, 1.0, 3.0]), variant=st.sampled_from(["tdpo1", "tdpo2"]),
)  # fmt: skip
def test_loss_rewards_and_cotangents_are_the_oracles(seed, size, beta, alpha, variant):
    stats = random_stats(size=size, seed=seed)
    out, g_logp, g_kl = run(stats, beta=beta, alpha=alpha, variant=variant, reduction="none")
    sides = [oracle.Tokens(*(x[i].tolist() for x in (stats.logp, stats.ref_logp, stats.kl))) for i in range(6)]
    for i in range(3):
        want = oracle.pair(sides[i], sides[i + 3], beta, alpha, variant)
        assert close(out.loss[i], want.loss, size)
        assert close(out.chosen_rewards[i], want.chosen_reward, size)
        assert close(out.rejected_rewards[i], want.rejected_reward, size)
        assert close(out.chosen_logps[i], math.fsum(sides[i].logp), size)
        assert close(out.rejected_kl[i], math.fsum(sides[i + 3].kl), size)
        assert close(out.ref_rejected_logps[i], math.fsum(sides[i + 3].ref_logp), size)
        for row, (a, b) in ((i, want.g_chosen), (i + 3, want.g_rejected)):
            assert all(close(x, a) for x in g_logp[row]) and all(close(x, b) for x in g_kl[row])


@pytest.mark.parametrize("rows", [[0], [3], [0, 3], [0, 1, 2, 3, 4, 5]], ids=["chosen", "rejected", "both", "all"])
def test_alpha_zero_is_dpo_where_a_kl_is_infinite(rows):
    """0 x (inf - inf) is NaN: with alpha = 0 there is no KL in the loss to multiply."""
    stats = random_stats()
    kl = stats.kl.detach().clone()
    kl[rows, 2] = math.inf
    want, *grads = run(stats, alpha=0.0, reduction="none")
    out, *found = run(replace(stats, kl=kl.requires_grad_()), alpha=0.0, reduction="none")
    assert torch.equal(out.loss, want.loss) and all(torch.equal(a, b) for a, b in zip(found, grads, strict=True))
    assert torch.equal(torch.cat([out.chosen_kl, out.rejected_kl]).isinf().nonzero()[:, 0], torch.tensor(rows))


LONG = 131072


def long_stats() -> TokenStats:
    """One pair in fp32 with sums of 10^6 nats, whose chosen and rejected halves differ by a few nats only."""
    g = torch.Generator().manual_seed(0)
    logp = -20 * torch.rand(LONG, generator=g)
    kl = 10 * torch.rand(LONG, generator=g)
    nudge = torch.zeros(LONG)
    nudge[:: LONG // 4] = 1.0
    logps = torch.stack([logp, (logp - nudge).roll(77)])
    return TokenStats(logps.requires_grad_(), (logp - 1).expand(2, -1), torch.stack([kl, (kl + nudge).flip(0)]))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_sums_over_long_sequences_are_exact_to_rounding(packed, variant):
    """Sequential fp32 sums are nats off at 131,072 tokens, and so would be the difference that the loss is made of."""
    stats, options = long_stats(), dict(terms=Terms(0.5, 0.5, variant), reduction="sum")
    sides = [oracle.Tokens(*(x[i].tolist() for x in (stats.logp, stats.ref_logp, stats.kl))) for i in range(2)]
    want = oracle.pair(*sides, 0.5, 0.5, variant)
    if packed:
        stats = TokenStats(*(x.flatten() for x in (stats.logp, stats.ref_logp, stats.kl)))
        options["cu_seqlens"] = torch.tensor([0, LONG, 2 * LONG])
    out = preference_loss(stats, **options)
    (g_logp,) = torch.autograd.grad(out.loss, stats.logp)
    assert out.loss.dtype == out.chosen_kl.dtype == g_logp.dtype == torch.float32
    assert out.loss.item() == pytest.approx(want.loss, rel=1e-6) and 0.1 < want.loss < 10
    for have, exact in (
        (out.chosen_logps, math.fsum(sides[0].logp)), (out.rejected_logps, math.fsum(sides[1].logp)),
        (out.ref_chosen_logps, math.fsum(sides[0].ref_logp)), (out.rejected_kl, math.fsum(sides[1].kl)),
        (out.chosen_rewards, want.chosen_reward), (out.rejected_rewards, want.rejected_reward),
    ):  # fmt: skip
        assert have.item() == pytest.approx(exact, rel=6e-8)
    slopes = g_logp.view(2, LONG)
    assert slopes[0].eq(slopes[0, 0]).all() and slopes[1].eq(-slopes[0, 0]).all()
    assert slopes[0, 0].item() == pytest.approx(want.g_chosen[0], rel=1e-6)


@pytest.mark.parametrize("offsets", [[0, 0, 5, 5], [0, 3, 3, 5], [0, 0, 0, 0]], ids=str)
def test_empty_sequences_sum_to_zero(offsets):
    x = torch.arange(float(offsets[-1]), requires_grad=True)
    sums = sequence_sums(x, torch.tensor(offsets))
    assert sums.tolist() == [sum(range(a, b)) for a, b in zip(offsets, offsets[1:], strict=False)]
    assert torch.autograd.grad(sums.sum(), x)[0].eq(1).all()
