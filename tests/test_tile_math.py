"""`tile_math` alone, in fp32, against the scalar oracle: parts, their merge in any order, and what is staged."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tdpo_kernels.backends import tile_math
from tdpo_kernels.backends.tile_math import LOWEST

F32, F64 = torch.float32, torch.float64
KINDS = ("flat", "peaked", "near", "equal", "offset", "hated", "loved", "ruled_out")


def rows(kind: str, V: int = 24, R: int = 5, seed: int = 0, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z, noise = (torch.randn(R, V, generator=g, dtype=F64) for _ in range(2))
    z *= 12.0 if kind == "peaked" else 1.0
    r = z + noise * {"peaked": 4.0, "near": 1e-3, "equal": 0.0}.get(kind, 0.5)
    if kind == "offset":
        r += 50
    elif kind == "hated":
        z[:, V // 2] -= 104
    elif kind == "loved":
        z[:, V // 2] += 45
    elif kind == "ruled_out":
        z[:, ::5], r[:, ::5] = LOWEST, LOWEST
    return z.to(dtype), r.to(dtype)


def part(z: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    """lse_z, lse_r, mean, phi, and p, q, y."""
    z, r = z.clone(), r.clone()
    p, q, y = (torch.empty_like(z) for _ in range(3))
    lse_z, lse_r = tile_math.softmax_(z, out=p), tile_math.softmax_(r, out=q)
    mean, phi = tile_math.divergence_(z, r, p, q, y, lse_z, lse_r)
    return lse_z, lse_r, mean, phi, p, q, y


def merged(z: Tensor, r: Tensor, pieces: list[list[int]]) -> tile_math.RowState:
    parts = [torch.stack(part(z[:, c], r[:, c])[:4]) for c in pieces]
    return tile_math.merge(torch.stack(parts, 1))


def floats(x: Tensor) -> list[float]:
    return [-math.inf if v < LOWEST / 10 else v for v in x.double().tolist()]


def close(found: Tensor, want: float, relative: float = 3e-6, absolute: float = 0.0) -> bool:
    return abs(float(found) - want) <= relative * abs(want) + absolute


def check_state(state: tile_math.RowState, z: Tensor, r: Tensor, relative: float = 3e-6) -> None:
    for i in range(len(z)):
        zi, ri = floats(z[i]), floats(r[i])
        want, lse_z, lse_r = oracle.kl(zi, ri), oracle.logsumexp(zi), oracle.logsumexp(ri)
        size = max(abs(x) for x in (*zi, *ri) if math.isfinite(x))
        assert close(state.kl[i], want, relative, (2e-7 * size) ** 2 + 2e-7 * size * math.sqrt(want))
        assert close(state.lse_z[i], lse_z, 1e-6, 1e-6) and close(state.lse_r[i], lse_r, 1e-6, 1e-6)
        assert close(state.lse_diff[i], lse_z - lse_r, 1e-6, 4e-7 * size)


@pytest.mark.parametrize("kind", KINDS)
def test_softmax_returns_probabilities_and_lse(kind):
    z, _ = rows(kind)
    p = torch.empty_like(z)
    lse = tile_math.softmax_(z, out=p)
    for i in range(len(z)):
        want = oracle.log_softmax(floats(z[i]))
        assert close(lse[i], oracle.logsumexp(floats(z[i])), 1e-6, 1e-6)
        assert all(close(x, math.exp(w), 2e-5, 1e-37) for x, w in zip(p[i], want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_one_part_is_equation_8(kind):
    z, r = rows(kind)
    lse_z, lse_r, mean, phi, *_, y = part(z, r)
    check_state(tile_math.merge(torch.stack([lse_z, lse_r, mean, phi])[:, None]), z, r)
    allowed = z > LOWEST / 10
    q = r.double().softmax(-1)
    want = (q * (z.double() - r.double())).masked_fill(~allowed, 0).sum(-1)
    assert torch.allclose(mean.double(), want, rtol=1e-6, atol=1e-6)
    centred = (z.double() - r.double() - want[:, None]).float()
    assert torch.allclose(y[allowed], centred[allowed], rtol=1e-5, atol=1e-5)


SPLITS = (
    [range(0, 8), range(8, 16), range(16, 24)],
    [range(0, 1), range(1, 24)],
    [range(i, i + 1) for i in range(24)],
    [range(24)],
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS, ids=lambda s: str(len(s)))
def test_any_split_merges_to_the_whole(split, kind):
    z, r = rows(kind)
    pieces = [list(c) for c in split]
    check_state(merged(z, r, pieces), z, r)
    check_state(merged(z, r, pieces[::-1]), z, r)


@given(seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS), data=st.data())
def test_any_partition_in_any_order_gives_the_same(seed, kind, data):
    z, r = rows(kind, seed=seed)
    columns = data.draw(st.permutations(range(24)))
    cuts = sorted(data.draw(st.sets(st.integers(1, 23), max_size=6)))
    pieces = [columns[a:b] for a, b in zip([0, *cuts], [*cuts, 24], strict=True)]
    state = merged(z, r, pieces)
    check_state(state, z, r)
    if kind == "equal":
        assert not state.kl.count_nonzero() and not state.lse_diff.count_nonzero()


@pytest.mark.parametrize("gap", (20.0, 60.0, 100.0, 300.0, 1000.0))
@pytest.mark.parametrize("split", SPLITS, ids=lambda s: str(len(s)))
def test_parts_beyond_what_exp_holds_merge(split, gap):
    """The policy all but sure of a token the reference hardly likes, and the reverse, in whichever part."""
    z, r = rows("flat")
    z[:, 3] += gap
    r[:, 20] += gap
    check_state(merged(z, r, [list(c) for c in split]), z, r)


@pytest.mark.parametrize("beyond", (15.0, 15.9, 16.1, 17.0, 25.0, 40.0))
def test_what_the_cut_leaves_out_is_added_as_mass(beyond):
    """One column of a single part well above CUT, with a weight that matters."""
    z, r = rows("near")
    z[:, 7] += beyond
    r[:, 7] -= 1.0
    lse_z, lse_r, mean, phi, *_ = part(z, r)
    check_state(tile_math.merge(torch.stack([lse_z, lse_r, mean, phi])[:, None]), z, r)


def test_part_ruled_out_altogether_weighs_nothing():
    z, r = rows("flat")
    z[:, 8:16], r[:, 8:16] = LOWEST, LOWEST
    check_state(merged(z, r, [list(c) for c in SPLITS[0]]), z, r)


# --- what is staged ---------------------------------------------------------------------------------------------------


def staged(z: Tensor, r: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """p, t and the offset as `tiled` stages them."""
    lse_z, lse_r, mean, phi, p, q, y = part(z, r)
    offset = tile_math.log_ratio_(y, lse_z, lse_r, mean, phi)
    y = y if dtype is None else y.to(dtype).to(p.dtype)
    tile_math.weigh_(p, q, y, torch.empty_like(p))
    return p, y, offset, (lse_z, lse_r, mean, phi)


@pytest.mark.parametrize("kind", KINDS)
def test_staged_t_is_the_log_ratio_within_the_part(kind):
    z, r = rows(kind)
    p, t, offset, (lse_z, lse_r, _, _) = staged(z, r)
    floor = tile_math.largest_exponent(F32)
    for i in range(len(z)):
        log_p, log_q = oracle.log_softmax(floats(z[i])), oracle.log_softmax(floats(r[i]))
        assert close(offset[i], float(lse_z[i]) - float(lse_r[i]), 1e-6, 2e-5)
        for v in range(z.shape[1]):
            if log_p[v] > -math.inf and log_p[v] - log_q[v] > -floor:
                assert close(p[i, v], math.exp(log_p[v]), 2e-5, 1e-37)
                assert close(t[i, v], log_p[v] - log_q[v], 1e-5, 2e-5)


@pytest.mark.parametrize("dtype", (None, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", (0.0, 70.0, 104.0, 300.0))
def test_staged_pair_gives_q_even_where_p_vanishes(gap, kind, dtype):
    """q = p e^-t: wherever q > p to fp32 rounding, though t is rounded to bf16; elsewhere to bf16's."""
    z, r = rows(kind)
    z[:, 9] -= gap
    p, t, *_ = staged(z, r, dtype)
    q = p.double() * (-t.double()).exp()
    for i in range(len(z)):
        want = [math.exp(x) for x in oracle.log_softmax(floats(r[i]))]
        for v, w in enumerate(want):
            exact = dtype is None or t[i, v] <= 0
            assert close(q[i, v], w, 5e-5 if exact else 0.1 + float(t[i, v].abs()) * 2**-8, 1e-30)


@pytest.mark.parametrize("size", (1e-6, 1e-3, 0.1, 3.0, 60.0))
def test_weighing_gives_q_where_q_is_the_larger_and_leaves_p_where_p_is(size):
    """Whatever rounding t has been through."""
    g = torch.Generator().manual_seed(3)
    q, t = torch.rand(4, 50, generator=g), size * torch.randn(4, 50, generator=g)
    t.clamp_(min=-tile_math.largest_exponent(F32))  # as `log_ratio_` leaves it
    p, rounded = q * t.exp(), t.bfloat16().float()
    weighed = p.clone()
    tile_math.weigh_(weighed, q.clone(), rounded, torch.empty_like(t))
    below = (t < 0) & (rounded < 0)
    found = weighed.double() * (-rounded.double()).exp()
    assert torch.allclose(found[below], q.double()[below], rtol=1e-5, atol=0)
    assert torch.allclose(weighed[~below], p[~below], rtol=1e-6, atol=0)


def test_anchor_is_the_first_largest_unless_ruled_out():
    x = torch.tensor([[1.0, 5.0, 2.0], [LOWEST, LOWEST, LOWEST], [LOWEST, -3.0, LOWEST]])
    assert tile_math.anchor(x).tolist() == [5.0, 0.0, -3.0]


def test_results_that_lean_on_the_stand_in_become_infinities():
    x = torch.tensor([0.0, -50.0, LOWEST, LOWEST * 0.99, -LOWEST])
    assert tile_math.to_infinity(x).tolist() == [0.0, -50.0, -math.inf, -math.inf, math.inf]


@pytest.mark.parametrize("offset", (8.0, -3.0, 96.0))
def test_an_offset_the_logits_hold_exactly_leaves_no_trace(offset):
    """Though the fp32 sum of q is not 1: the second centring takes away what the first leaves."""
    r = torch.randn(6, 4096).mul(512).round() / 256
    lse_z, lse_r, mean, phi, *_, y = part(r + offset, r)
    state = tile_math.merge(torch.stack([lse_z, lse_r, mean, phi])[:, None])
    assert y.abs().max() <= 1e-9 and not state.kl.count_nonzero()
    assert (state.lse_diff - offset).abs().max() <= 2**-23 * abs(offset)
