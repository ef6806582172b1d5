"""`tile_math` alone, in fp32, against the scalar oracle: parts, their merge in any order, and what is staged."""

from __future__ import annotations

import math
from typing import NamedTuple

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tdpo_kernels import LMHead
from tdpo_kernels.backends import tile_math
from tdpo_kernels.backends.tile_math import LOWEST
from tdpo_kernels.types import Model

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


class Tile(NamedTuple):
    """What a tile's row mathematics leaves."""

    part: tile_math.Part
    p: Tensor
    q: Tensor
    p_less_q: Tensor
    t: Tensor
    excess: Tensor


def tile(z: Tensor, r: Tensor) -> Tile:
    tiles = torch.stack([z, r])
    pair = torch.empty_like(tiles)
    tops_2R, lse_2R = tile_math.softmax(tiles, out=pair)
    (z, r), (p, q) = tiles, pair
    lse_diff = lse_2R[0] - lse_2R[1]
    half_y, _ = tile_math.half_log_ratio_(tiles, tops_2R, lse_diff, out=r)
    t, q_before = 2 * half_y, q.clone()
    excess, kl = tile_math.divergence_(half_y, p, q, q, scratch=z)
    tile_math.subtract_(t, excess)
    return Tile(tile_math.Part(tops_2R, lse_2R, kl, lse_diff + excess), p, q_before, q, t, excess)


def merged(z: Tensor, r: Tensor, pieces: list[list[int]]) -> tile_math.Part:
    return tile_math.merge([tile(z[:, c], r[:, c]).part for c in pieces])


def floats(x: Tensor) -> list[float]:
    return [-math.inf if v < LOWEST / 10 else v for v in x.double().tolist()]


def close(found: Tensor, want: float, relative: float = 3e-6, absolute: float = 0.0) -> bool:
    return abs(float(found) - want) <= relative * abs(want) + absolute


def check_state(state: tile_math.Part, z: Tensor, r: Tensor, relative: float = 3e-6) -> None:
    for i in range(len(z)):
        zi, ri = floats(z[i]), floats(r[i])
        want, lse_z, lse_r = oracle.kl(zi, ri), oracle.logsumexp(zi), oracle.logsumexp(ri)
        size = max(abs(x) for x in (*zi, *ri) if math.isfinite(x))
        assert close(state.kl[i], want, relative, (2e-7 * size) ** 2 + 2e-7 * size * math.sqrt(want))
        z_top, r_top = max(zi), max(ri)
        assert state.tops_2R[:, i].tolist() == [z_top, r_top]
        assert close(state.lse_2R[0, i], lse_z - z_top, 1e-6, 1e-6)
        assert close(state.lse_2R[1, i], lse_r - r_top, 1e-6, 1e-6)
        assert close(state.lse_diff[i], (lse_z - z_top) - (lse_r - r_top), 1e-6, 4e-7 * size)


@pytest.mark.parametrize("kind", KINDS)
def test_softmax_returns_probabilities_and_lse(kind):
    z, _ = rows(kind)
    p = torch.empty_like(z)
    top, lse = tile_math.softmax(z.clone(), out=p)
    assert top.equal(z.amax(-1))
    for i in range(len(z)):
        want = oracle.log_softmax(floats(z[i]))
        assert close(lse[i], oracle.logsumexp([v - float(top[i]) for v in floats(z[i])]), 1e-6, 1e-6)
        assert all(close(x, math.exp(w), 2e-5, 1e-37) for x, w in zip(p[i], want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_one_tile_is_the_whole_vocabulary(kind):
    z, r = rows(kind)
    found = tile(z, r)
    check_state(found.part, z, r)
    p, q = z.double().softmax(-1), r.double().softmax(-1)
    ratio = z.double().log_softmax(-1) - r.double().log_softmax(-1)
    held = (z > LOWEST / 10) & (ratio > -tile_math.largest_exponent(F32))
    assert torch.allclose(found.t[held].double(), ratio[held], rtol=1e-5, atol=1e-5)
    p_less_q = found.p_less_q - found.excess[:, None] * found.p
    assert torch.allclose(p_less_q.double(), p - q, rtol=1e-4, atol=1e-7)
    assert (p_less_q.sum(-1).abs() <= 2e-6 * (p - q).abs().amax(-1)).all()


@given(
    log_p=st.floats(-700, 0),
    near=st.floats(-1, 1),
    far=st.floats(-700, 0),
    exponent=st.integers(-9, 0),
    is_near=st.booleans(),
)
def test_equation_8_has_the_digits_of_the_log_ratio(log_p, near, far, exponent, is_near):
    log_q = log_p + near * 10.0**exponent if is_near else far
    want = math.exp(log_p) * math.expm1(log_q - log_p)
    p, q, ratio = (torch.tensor(x, dtype=F64) for x in (math.exp(log_p), math.exp(log_q), log_q - log_p))
    assert close(tile_math.difference(p, q, ratio), want, 1e-12, 1e-300)


@pytest.mark.parametrize("size", (1e-5, 1e-3, 0.1))
def test_the_difference_of_the_lses_has_the_digits_of_the_log_ratios(size):
    """Themselves rounded to some 3e-7, they would leave no row of dz a sum of 0."""
    z, noise = torch.randn(2, 64, 1000, generator=torch.Generator().manual_seed(0))
    r = z + size * noise
    state = tile(z, r).part
    want = torch.sub(*(torch.stack([z, r]).double().logsumexp(-1) - state.tops_2R))
    assert (state.lse_diff - want).abs().max() <= 3e-8


@pytest.mark.parametrize("offset", (0.5, 8.0, -8.0, 1000.0))
def test_an_offset_between_the_models_costs_log_ratios_no_digits(offset):
    """Logits and what they are above their tops are exact: only the order of the differences can lose anything."""
    units = torch.randint(-(2**20), 2**20, (2, 64, 24), generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([2.0**-13 if abs(offset) > 8 else 2.0**-20, 2.0**-22])
    tiles = (units.double() * steps[:, None, None].double() / torch.tensor([1.0, 2.0]).double()[:, None, None]).float()
    tiles[0] += offset
    tops, wide = tiles.amax(-1), tiles.double()
    want = 0.5 * torch.sub(*(wide - tops.double()[..., None]))
    half_y, _ = tile_math.half_log_ratio_(tiles, tops, torch.zeros(64), out=torch.empty_like(tiles[0]))
    assert (half_y - want).abs().max() <= torch.finfo(F32).eps * want.abs().max()


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


@pytest.mark.parametrize("beyond", (16.0, 40.0, 100.0))
def test_one_column_far_above_a_tile_of_models_that_nearly_agree(beyond):
    z, r = rows("near")
    z[:, 7] += beyond
    r[:, 7] -= 1.0
    check_state(tile(z, r).part, z, r)


def test_part_ruled_out_altogether_weighs_nothing():
    z, r = rows("flat")
    z[:, 8:16], r[:, 8:16] = LOWEST, LOWEST
    check_state(merged(z, r, [list(c) for c in SPLITS[0]]), z, r)


@pytest.mark.parametrize("depth", (-50.0, -1e4, -1e9, LOWEST))
@pytest.mark.parametrize("kind", ("flat", "peaked", "near", "offset"))
def test_a_part_far_below_the_others_costs_them_no_digits(kind, depth):
    """Whichever comes first."""
    z, r = rows(kind)
    z, r = z.mul(2**16).round() / 2**16, r.mul(2**16).round() / 2**16  # so that 50 less is exact
    alone = merged(z[:, 8:], r[:, 8:], [list(range(16))])
    check_state(alone, z[:, 8:], r[:, 8:])
    for x in (z, r):
        x[:, :8] = x[:, :8] + depth if depth > -100 else depth
    for split in (SPLITS[0], SPLITS[0][::-1], SPLITS[2]):
        state = merged(z, r, [list(c) for c in split])
        for name, want in alone._asdict().items():
            assert torch.allclose(getattr(state, name), want, rtol=3e-6, atol=1e-6), name


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: str(len(s)))
@pytest.mark.parametrize("depth", (-1e4, -1e9, LOWEST))
def test_a_mean_without_digits_costs_the_difference_of_the_lses_none(depth, split):
    z, r = rows("flat")
    z[:, 5] = depth
    state = merged(z, r, [list(c) for c in split])
    want = torch.sub(*(torch.stack([z, r]).double().logsumexp(-1) - state.tops_2R))
    assert torch.allclose(state.lse_diff.double(), want, rtol=0, atol=1e-5)
    log_p, log_q = z.double().log_softmax(-1), r.double().log_softmax(-1)
    assert torch.allclose(state.kl.double(), (log_q.exp() * (log_q - log_p)).sum(-1), rtol=3e-6)


class Bias:
    """Policy and reference by what their biases rule out."""

    def __init__(self, *values: float, dtype: torch.dtype = F32, **options: float) -> None:
        bias = None if not values else torch.tensor(values)
        self.model = Model(torch.zeros(1, 2), LMHead(torch.zeros(3, 2), bias, **options), dtype)


@pytest.mark.parametrize(
    "policy, reference, want",
    [
        (Bias(), Bias(), None),
        (Bias(), Bias(-math.inf, 0, 0), None),
        (Bias(0, 0, -1e9), Bias(0, 0, 0), False),
        (Bias(0, 0, -math.inf), Bias(), True),
        (Bias(0, 0, -math.inf), Bias(0, 0, -1e9), True),
        (Bias(0, 0, -math.inf), Bias(0, 0, -math.inf), False),
        (Bias(0, -math.inf, -math.inf), Bias(0, 0, -math.inf), True),
        (Bias(0, 0, -math.inf), Bias(0, -math.inf, -math.inf), False),
        (Bias(0, 0, -math.inf, softcap=3.0), Bias(), None),
        (Bias(0, 0, -math.inf), Bias(0, 0, -math.inf, softcap=3.0), True),
        (Bias(0, 0, -1e9, dtype=torch.float16), Bias(0, 0, 0), True),  # autocast rounds it to -inf
        (Bias(0, 0, -1e28, logit_scale=50.0), Bias(0, 0, 0), True),  # below LOWEST is ruled out
    ],
)
def test_kl_is_infinite_where_the_policy_alone_rules_out(policy, reference, want):
    found = tile_math.kl_is_infinite(policy.model, reference.model)
    assert found is want if want is None else found.item() is want


# --- what is staged ---------------------------------------------------------------------------------------------------


def staged(z: Tensor, r: Tensor, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor, tile_math.Part]:
    """p and t as `tiled` stages them of a steep tile, t rounded to `dtype`."""
    found = tile(z, r)
    p, t = found.p, found.t.to(dtype).float()
    tile_math.weigh_(p, p - found.p_less_q, t, torch.empty_like(p))
    return p, t, found.part


@pytest.mark.parametrize("kind", KINDS)
def test_staged_t_is_the_log_ratio_within_the_part(kind):
    z, r = rows(kind)
    p, t, _ = staged(z, r)
    floor = tile_math.largest_exponent(F32)
    for i in range(len(z)):
        log_p, log_q = oracle.log_softmax(floats(z[i])), oracle.log_softmax(floats(r[i]))
        for v in range(z.shape[1]):
            if log_p[v] > -math.inf and log_p[v] - log_q[v] > -floor:
                assert close(p[i, v], math.exp(log_p[v]), 2e-5, 1e-37)
                assert close(t[i, v], log_p[v] - log_q[v], 1e-5, 2e-5)


@pytest.mark.parametrize("depth", (-300.0, -1e4, -1e9, LOWEST))
def test_staged_t_keeps_its_digits_however_low_one_column_is(depth):
    z, r = rows("flat")
    z[:, 5] = depth
    p, t, _ = staged(z, r)
    log_p, log_q = z.double().log_softmax(-1), r.double().log_softmax(-1)
    rest = [v for v in range(24) if v != 5]
    assert torch.allclose(t.double()[:, rest], (log_p - log_q)[:, rest], rtol=0, atol=1e-5)
    assert torch.allclose(p.double() * (-t.double()).exp(), log_q.exp(), rtol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS[:3], ids=lambda s: str(len(s)))
def test_tile_weights_make_p_and_q_of_a_part_those_of_the_whole(split, kind):
    z, r = rows(kind)
    tiles = [staged(z[:, list(c)], r[:, list(c)]) for c in split]
    parts = [found for *_, found in tiles]
    weights = tile_math.tile_weights([], parts, tile_math.merge(parts))
    p, q = z.double().softmax(-1), r.double().softmax(-1)
    for columns, (p_k, t_k, _), (weight, ref_weight, ratio) in zip(split, tiles, weights.unbind(1), strict=True):
        found_q = (ref_weight.double()[:, None] * p_k) * (-t_k - ratio[:, None]).double().exp()
        assert torch.allclose((weight[:, None] * p_k).double(), p[:, list(columns)], rtol=1e-4, atol=1e-12)
        assert torch.allclose(found_q, q[:, list(columns)], rtol=1e-4, atol=1e-30)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS[:3], ids=lambda s: str(len(s)))
def test_masses_of_parts_within_the_whole(split, kind):
    """Their difference, too, to the digits of the log-ratio."""
    z, r = rows(kind)
    parts = [tile(z[:, list(c)], r[:, list(c)]).part for c in split]
    found = tile_math.within(parts, tile_math.merge(parts)).double()
    p, q = z.double().softmax(-1), r.double().softmax(-1)
    want = torch.stack([torch.stack([x[:, list(c)].sum(-1) for c in split]) for x in (p, q, q - p)])
    assert torch.allclose(found[:2], want[:2], rtol=1e-5, atol=1e-30)
    size = max(abs(v) for x in (z, r) for v in x.flatten().tolist() if v > LOWEST / 10)
    assert ((found[2] - want[2]).abs() <= 2e-7 * size * want[:2].amax(0) + 3e-6 * want[2].abs()).all()
    if kind == "equal":
        assert not found[2].count_nonzero()


@pytest.mark.parametrize("size", (0.0, 2**-20, 2**-10, 0.1, 0.5, 3.0))
def test_rounded_p_and_t_are_made_up_for_in_their_sums(size):
    """Half the columns share one log-ratio. Without the column 7, whose p and q the caller knows."""
    z = torch.randn(6, 512, generator=torch.Generator().manual_seed(1)).mul(256).round() / 256
    r = z + size * (torch.arange(512) % 2)
    found, p, q, _, t, _ = tile(z, r)
    label = p[:, 7].clone(), q[:, 7].clone(), -t[:, 7]
    p[:, 7], q[:, 7] = 0, 0
    kept, t = p.sum(-1), t.bfloat16().float()
    tile_math.weigh_(p, q, t, torch.empty_like(p))
    p = p.bfloat16().float()
    rounding = tile_math.rounding(p, t, kept, label, torch.empty_like(p))
    weights = tile_math.tile_weights([rounding], [found], found)
    weight, ref_weight, ratio = weights[:, 0].double()
    p = weight[:, None] * p
    more_q = (p * (-t - ratio[:, None]).double().expm1()).sum(-1)
    log_p, log_q = z.double().log_softmax(-1), r.double().log_softmax(-1)
    rest = torch.arange(512) != 7
    want = (log_p.exp() * (log_q - log_p).expm1())[:, rest].sum(-1)
    assert ref_weight.equal(weight) and torch.allclose(p.sum(-1), log_p.exp()[:, rest].sum(-1), rtol=2e-6)
    assert torch.allclose(more_q, want, rtol=1e-4, atol=2e-6 * size)  # before: up to 4e-3 x size off


@pytest.mark.parametrize("dtype", (F32, torch.bfloat16), ids=("fp32", "bf16"))
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
            exact = dtype == F32 or t[i, v] <= 0
            assert close(q[i, v], w, 5e-5 if exact else 0.1 + float(t[i, v].abs()) * 2**-8, 1e-30)


@pytest.mark.parametrize("size", (1e-6, 1e-3, 0.1, 3.0, 60.0))
def test_weighing_gives_q_where_q_is_the_larger_and_leaves_p_where_p_is(size):
    """Whatever rounding t has been through."""
    g = torch.Generator().manual_seed(3)
    q, t = torch.rand(4, 50, generator=g), size * torch.randn(4, 50, generator=g)
    t.clamp_(min=-tile_math.largest_exponent(F32))  # as `subtract_` leaves it
    p, rounded = q * t.exp(), t.bfloat16().float()
    weighed = p.clone()
    tile_math.weigh_(weighed, q.clone(), rounded, torch.empty_like(t))
    below = (t < 0) & (rounded < 0)
    found = weighed.double() * (-rounded.double()).exp()
    assert torch.allclose(found[below], q.double()[below], rtol=1e-5, atol=0)
    assert torch.allclose(weighed[~below], p[~below], rtol=1e-6, atol=0)


def test_results_that_lean_on_the_stand_in_become_infinities():
    x = torch.tensor([0.0, -50.0, LOWEST, LOWEST * 0.99, -LOWEST])
    assert tile_math.to_infinity(x).tolist() == [0.0, -50.0, -math.inf, -math.inf, math.inf]


@pytest.mark.parametrize("offset", (8.0, -3.0, 96.0))
def test_an_offset_the_logits_hold_exactly_leaves_no_trace(offset):
    r = torch.randn(6, 4096).mul(512).round() / 256
    found = tile(r + offset, r)
    assert not found.p_less_q.count_nonzero() and not found.part.kl.count_nonzero()
    assert not found.part.lse_diff.count_nonzero() and (torch.sub(*found.part.tops_2R) == offset).all()
