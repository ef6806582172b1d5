"""`device/math.py`, each function through a wrapper of loads, one call, and stores, against the scalar oracle."""

from __future__ import annotations

import math
from typing import NamedTuple

import oracle
import pytest
import torch
import triton
import triton.language as tl
from harness import (
    EPS,
    F32,
    F64,
    KINDS,
    Row,
    check_all,
    close,
    every_kind,
    exact_rows,
    floats,
    launch,
    on_grid,
    padded,
    poisoned,
    power_of_2,
    row,
    rows,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st
from runnable import mainly
from torch import Tensor

from tdpo_kernels.backends import tile_math
from tdpo_kernels.backends.tile_math import LOWEST
from tdpo_kernels.device import math as device

NEAR, LARGE, CUT = (float(torch.tensor(x.value, dtype=F32)) for x in (device.NEAR, device.LARGE, device.CUT))
F = tile_math.largest_exponent(F32)
ORACLE = 2.0**-48  # what its log-sum-exp in float64 is off by


def test_device_and_host_mean_the_same_by_their_constants():
    assert float(device.LOWEST.value) == LOWEST
    assert device.ROUNDING.value == tile_math.ROUNDING
    assert math.log(LARGE) < float(device.TOP_EXPONENT.value) < math.log(torch.finfo(F32).max)


# --- functions of one number ------------------------------------------------------------------------------------------


@triton.jit
def _each(function: tl.constexpr, x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, function(tl.load(x + at)))


def each(function, x: Tensor) -> Tensor:
    x = padded(x, 0.0)
    out = poisoned(len(x))
    launch(_each, (1,), function, x, out, len(x))
    return out


def spread(low: float, high: float) -> Tensor:
    """Both signs, evenly in size, and the edges of the series to the last bit."""
    sizes = torch.logspace(math.log10(low), math.log10(high), 200, dtype=F64).float()
    near = torch.tensor(NEAR)
    edges = torch.stack([near, *(torch.nextafter(near, near + s) for s in (1, -1))])
    sizes = torch.cat([sizes, edges, torch.zeros(1)])
    return torch.cat([sizes, -sizes])


def exact_psi(y: float) -> float:
    return oracle.phi(-y)


def check_each(function, x: Tensor, want, bound) -> None:
    values = x.double().tolist()
    true = [want(v) for v in values]
    check_all(each(function, x)[: len(x)], true, lambda i: bound(values[i], true[i]))


def test_psi_series():
    x = spread(1e-6, NEAR)
    check_each(device.psi_series, x[x.abs() <= NEAR], exact_psi, lambda y, want: 4 * EPS * want)


def in_float64(function, x: Tensor) -> Tensor:
    """As if it were rounded nowhere: what is left is where a series ends."""
    out = poisoned(power_of_2(len(x)), dtype=F64)
    launch(_each, (1,), function, padded(x.double(), 0.0), out, len(out))
    return out[: len(x)]


def test_a_series_has_all_its_terms():
    x = torch.linspace(-NEAR, NEAR, 101, dtype=F64)
    for function, want, off in (
        (device.psi_series, exact_psi, 4e-9),
        (device.expm1, math.expm1, 4e-9),
        (device.log1p, math.log1p, 2e-9),
    ):
        true = [want(v) for v in x.tolist()]
        check_all(in_float64(function, x), true, lambda i, true=true, off=off: off * abs(true[i]))
    ends = torch.tensor([-0.4999, -0.45, 0.5, 0.999], dtype=F64)
    check_all(in_float64(device.log1p, ends), [math.log1p(v) for v in ends.tolist()], lambda i: 2e-9)


def test_psi():
    """To a few eps of itself by the series, of its terms beyond; never negative."""
    x = spread(1e-6, 80.0)
    check_each(
        device.psi, x, exact_psi, lambda y, w: 4 * EPS * w if abs(y) < NEAR else EPS * (math.exp(y) + abs(1 + y))
    )
    assert (each(device.psi, x) >= 0).all()


def test_expm1():
    check_each(
        device.expm1, spread(1e-6, 80.0), math.expm1,
        lambda x, w: 2 * EPS * abs(w) if abs(x) < NEAR else EPS * (math.exp(x) + 1),
    )  # fmt: skip


def test_log1p():
    x = torch.cat([spread(1e-9, 1e12).abs(), torch.tensor([1.0]), torch.nextafter(torch.ones(1), torch.zeros(1))])
    check_each(device.log1p, x, math.log1p, lambda x, w: 3 * EPS * w)
    below = torch.cat(
        [-spread(1e-9, 0.99).abs(), torch.tensor([-0.5]), torch.nextafter(-torch.ones(1) / 2, torch.zeros(1))]
    )
    check_each(device.log1p, below, math.log1p, lambda x, w: 4 * EPS * abs(w) + EPS * (x < -0.4))


def test_tanh():
    check_each(device.tanh, spread(1e-6, 80.0), math.tanh, lambda x, w: 4 * EPS * abs(w))


@triton.jit
def _slope(x, out, softcap, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, device.softcap_slope(tl.load(x + at), softcap))


@pytest.mark.parametrize("softcap", (2.0, 30.0))
def test_softcap_slope(softcap):
    x = torch.linspace(-4 * softcap, 4 * softcap, 64, dtype=F64)
    z, out = (softcap * (x / softcap).tanh()).float(), poisoned(64)
    launch(_slope, (1,), z, out, softcap, 64)
    check_all(out, (1 - (z.double() / softcap) ** 2).tolist(), lambda i: 2 * EPS)
    check_all(out, [1 / math.cosh(v / softcap) ** 2 for v in x.tolist()], lambda i: 4 * EPS)


# --- the head ---------------------------------------------------------------------------------------------------------


@triton.jit
def _head(
    x, bias, out, scale, softcap,
    R: tl.constexpr, C: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    bias_C = tl.load(bias + tl.arange(0, C))
    tl.store(out + at, device.head(tl.load(x + at), bias_C, scale, softcap, HAS_BIAS, HAS_SOFTCAP))


def head(x: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    out, bias_C = poisoned(*x.shape), torch.full(x.shape[1:], 1e9) if bias is None else bias
    cap = 1e-9 if softcap is None else softcap
    launch(
        _head, (1,), x, bias_C, out, scale, cap, *x.shape, HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None
    )
    return out


@pytest.mark.parametrize("softcap", (None, 2.0, 30.0))
@pytest.mark.parametrize("scale", (1.0, 0.3, 7.0))
@pytest.mark.parametrize("biased", (False, True))
def test_head(biased, scale, softcap):
    g = torch.Generator().manual_seed(1)
    x, bias = 4 * torch.randn(4, 32, generator=g), torch.randn(32, generator=g) if biased else None
    found = head(x, bias, scale, softcap)
    for i in range(len(x)):
        biases = bias.tolist() if biased else None
        want = oracle.logits([1.0], [[v] for v in x[i].tolist()], biases, torch.tensor(scale).item(), softcap)
        size = [scale * (abs(v) + (abs(float(bias[j])) if biased else 0)) for j, v in enumerate(x[i].tolist())]
        check_all(found[i], want, lambda j, size=size, want=want: 2 * EPS * size[j] + 4 * EPS * abs(want[j]))


@pytest.mark.parametrize("softcap", (None, 30.0))
@pytest.mark.parametrize("scale", (1.0, 0.3, 7.0))
def test_head_turns_what_a_bias_rules_out_into_lowest(scale, softcap):
    """And with a softcap into its negative, as the definition says."""
    bias = torch.zeros(16)
    bias[3] = -math.inf
    found = head(torch.randn(2, 16), bias, scale, softcap)
    assert torch.equal(found[:, 3], torch.full((2,), LOWEST if softcap is None else -softcap, dtype=F32))
    assert (found.abs() < 100).sum() == found.numel() - (2 if softcap is None else 0)


# --- states -----------------------------------------------------------------------------------------------------------


@triton.jit
def load_six(x, N: tl.constexpr):
    at = tl.arange(0, N)
    return (
        tl.load(x + at), tl.load(x + N + at), tl.load(x + 2 * N + at), tl.load(x + 3 * N + at), tl.load(x + 4 * N + at),
        tl.load(x + 5 * N + at),
    )  # fmt: skip


@triton.jit
def store_six(x, a, b, c, d, e, f, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(x + at, a)
    tl.store(x + N + at, b)
    tl.store(x + 2 * N + at, c)
    tl.store(x + 3 * N + at, d)
    tl.store(x + 4 * N + at, e)
    tl.store(x + 5 * N + at, f)


@triton.jit
def _tile_state(z, r, out, R: tl.constexpr, C: tl.constexpr):
    at = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    m_z, s_z, m_r, s_r, mean, M = device.tile_state(tl.load(z + at), tl.load(r + at))
    store_six(out, m_z, s_z, m_r, s_r, mean, M, R)


@triton.jit
def _empty(out, N: tl.constexpr):
    m_z, s_z, m_r, s_r, mean, M = device.empty_state(tl.arange(0, N).to(tl.float32))
    store_six(out, m_z, s_z, m_r, s_r, mean, M, N)


@triton.jit
def _merge(one, other, out, N: tl.constexpr):
    m_z, s_z, m_r, s_r, mean, M = load_six(one, N)
    n_z, t_z, n_r, t_r, other_mean, O = load_six(other, N)  # noqa: E741
    m_z, s_z, m_r, s_r, mean, M = device.merge(m_z, s_z, m_r, s_r, mean, M, n_z, t_z, n_r, t_r, other_mean, O)
    store_six(out, m_z, s_z, m_r, s_r, mean, M, N)


@triton.jit
def _finish(state, out, N: tl.constexpr):
    m_z, s_z, m_r, s_r, mean, M = load_six(state, N)
    lse_z, lse_r, phi = device.finish(s_z, s_r, M)
    kl, lse_diff = device.kl_of(lse_z, lse_r, mean, phi), device.lse_diff_of(lse_z, lse_r, mean, phi)
    store_six(out, m_z, m_r, lse_z, lse_r, kl, lse_diff, N)


class Finished(NamedTuple):
    m_z: Tensor
    m_r: Tensor
    lse_z: Tensor
    lse_r: Tensor
    kl: Tensor
    lse_diff: Tensor


def tile_state(z: Tensor, r: Tensor) -> Tensor:
    """``(6, R)``, R a power of 2. Columns past the last are ruled out, as a kernel does it."""
    z, r = padded(z, LOWEST), padded(r, LOWEST)
    out = poisoned(6, len(z))
    launch(_tile_state, (1,), z, r, out, *z.shape)
    return out


def empty(N: int) -> Tensor:
    out = poisoned(6, N)
    launch(_empty, (1,), out, N)
    return out


def merge(one: Tensor, other: Tensor) -> Tensor:
    out = torch.full_like(one, math.nan)
    launch(_merge, (1,), one, other, out, one.shape[1])
    return out


def finish(state: Tensor) -> Finished:
    out = torch.full_like(state, math.nan)
    launch(_finish, (1,), state, out, state.shape[1])
    return Finished(*out)


def part_states(z: Tensor, r: Tensor, pieces: list[list[int]]) -> list[Tensor]:
    """Of each piece of the vocabulary: all of them in one launch, one below the other."""
    width = max(len(c) for c in pieces)
    tall_z, tall_r = (torch.full((len(pieces), len(z), width), LOWEST) for _ in range(2))
    for k, columns in enumerate(pieces):
        tall_z[k, :, : len(columns)], tall_r[k, :, : len(columns)] = z[:, columns], r[:, columns]
    states = tile_state(tall_z.flatten(0, 1), tall_r.flatten(0, 1))[:, : len(pieces) * len(z)]
    return [padded(s.contiguous().T, 1.0).T[:6].contiguous() for s in states.split(len(z), 1)]


def folded(states: list[Tensor]) -> Tensor:
    """As the kernels do it: one after another, into what began empty."""
    total = empty(states[0].shape[1])
    for state in states:
        total = merge(total, state)
    return total


def in_pairs(states: list[Tensor]) -> Tensor:
    while len(states) > 1:
        states = [merge(*states[i : i + 2]) if i + 1 < len(states) else states[i] for i in range(0, len(states), 2)]
    return states[0]


def check_finished(found: Finished, z: Tensor, r: Tensor, parts: int = 1) -> list[Row]:
    """Rounding adds up over the parts: like a random walk in what they hold, hence the root."""
    true = [row(z[i], r[i]) for i in range(len(z))]
    more = 4 * math.sqrt(parts)
    for i, t in enumerate(true):
        sums = more * EPS * (1 + math.log(z.shape[1]))
        assert (float(found.m_z[i]), float(found.m_r[i])) == (t.m_z, t.m_r), f"row {i}"
        assert close(found.lse_z[i], t.lse_z, EPS, sums), f"row {i}: {found.lse_z[i]}, wanted {t.lse_z}"
        assert close(found.lse_r[i], t.lse_r, EPS, sums), f"row {i}: {found.lse_r[i]}, wanted {t.lse_r}"
        bound = more * EPS * t.kl_scale + 2 * t.lost * math.sqrt(2 * t.kl) + t.lost**2 + ORACLE
        assert close(found.kl[i], t.kl, 0, bound), f"row {i}: {found.kl[i]}, wanted {t.kl} to {bound}"
        bound = more * EPS * t.diff_scale + 2 * t.lost + ORACLE
        assert close(found.lse_diff[i], t.lse_diff, 0, bound), (
            f"row {i}: {found.lse_diff[i]}, wanted {t.lse_diff} to {bound}"
        )
        assert found.kl[i] >= 0
    return true


@pytest.mark.parametrize("V", (2, 24, 100))
def test_one_tile(V):
    z, r = every_kind(V)
    check_finished(finish(tile_state(z, r)), z, r)


def test_one_column_is_sure_of_itself():
    z, r = rows("flat", V=1)
    check_finished(finish(tile_state(z, r)), z, r)


SPLITS = (
    [range(0, 8), range(8, 16), range(16, 24)],
    [range(0, 1), range(1, 24)],
    [range(i, i + 1) for i in range(24)],
    [range(24)],
)
ORDERS = {"in turn": folded, "backwards": lambda s: folded(s[::-1]), "in pairs": in_pairs}


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: str(len(s)))
@pytest.mark.parametrize("order", ORDERS)
def test_any_split_merges_to_the_whole(order, split):
    z, r = every_kind()
    states = part_states(z, r, [list(c) for c in split])
    check_finished(finish(ORDERS[order](states)), z, r, len(split))


@given(seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS), data=st.data())
def test_any_partition_in_any_order_gives_the_same(seed, kind, data):
    """Columns shuffled, cut anywhere, and the parts merged by any tree."""
    z, r = rows(kind, seed=seed)
    columns = data.draw(st.permutations(range(24)))
    cuts = sorted(data.draw(st.sets(st.integers(1, 23), max_size=6)))
    pieces = [columns[a:b] for a, b in zip([0, *cuts], [*cuts, 24], strict=True)]
    states = part_states(z, r, pieces)
    while len(states) > 1:
        i = data.draw(st.integers(0, len(states) - 1))
        one = states.pop(i)
        j = data.draw(st.integers(0, len(states) - 1))
        states[j] = merge(one, states[j])
    found = finish(states[0])
    check_finished(found, z, r, len(pieces))
    if kind == "equal":
        assert not found.kl[:5].count_nonzero() and not found.lse_diff[:5].count_nonzero()


@given(seed=st.integers(0, 10**6), kinds=st.tuples(*[st.sampled_from(KINDS)] * 3))
def test_merge_commutes_to_the_bit_and_associates_to_rounding(seed, kinds):
    """Parts of different nature."""
    parts = [rows(kind, V=8, seed=seed + i) for i, kind in enumerate(kinds)]
    z, r = (torch.cat([part[i] for part in parts], 1) for i in range(2))
    one, two, three = part_states(z, r, [list(range(k, k + 8)) for k in (0, 8, 16)])
    assert torch.equal(merge(one, two), merge(two, one))
    for state in (merge(merge(one, two), three), merge(one, merge(two, three)), merge(merge(one, three), two)):
        check_finished(finish(state), z, r, 3)


def test_empty_state_is_neutral():
    """To the bit in the sums and maxima; to rounding in what is relative to a mean."""
    z, r = every_kind()
    state = tile_state(z, r)
    nothing = empty(state.shape[1])
    for found in (merge(state, nothing), merge(nothing, state)):
        check_finished(finish(found), z, r)
        assert torch.equal(found[:4], state[:4])


GAPS = (20.0, 27.0, 28.5, 60.0, 79.0, 81.0, 100.0, 300.0, 1000.0)


@pytest.mark.parametrize("gap", mainly((28.5, 300.0), GAPS))
@pytest.mark.parametrize("split", SPLITS, ids=lambda s: str(len(s)))
@pytest.mark.parametrize("who", ("policy", "reference", "both"))
def test_parts_beyond_what_exp_holds_merge(who, split, gap):
    """One all but sure of a token that the other hardly likes, in whichever part."""
    z, r = rows("flat")
    if who != "reference":
        z[:, 3] += gap
    if who != "policy":
        r[:, 20] += gap
    states = part_states(z, r, [list(c) for c in split])
    for order in (states, states[::-1]):
        check_finished(finish(folded(order)), z, r, len(split))


@pytest.mark.parametrize("gap", mainly((-20.0, -104.0), (-20.0, -104.0, -300.0, -1000.0)))
@pytest.mark.parametrize("split", SPLITS, ids=lambda s: str(len(s)))
@pytest.mark.parametrize("who", (0, 1), ids=("policy", "reference"))
def test_parts_that_one_model_hates_merge(who, split, gap):
    """A whole part far below, all of it liked by the other model."""
    pair = rows("flat")
    pair[who][:, 8:16] += gap
    states = part_states(*pair, [list(c) for c in split])
    for order in (states, states[::-1]):
        check_finished(finish(folded(order)), *pair, len(split))


@pytest.mark.parametrize("beyond", (15.0, 15.9, 16.1, 17.0, 25.0, 40.0))
def test_entries_and_parts_on_either_side_of_the_cut(beyond):
    """One column well above the rest, with a weight that matters: within a tile, and as a part of its own."""
    z, r = rows("near")
    z[:, 7] += beyond
    r[:, 7] -= 1.0
    check_finished(finish(tile_state(z, r)), z, r)
    states = part_states(z, r, [[*range(7), *range(8, 24)], [7]])
    check_finished(finish(folded(states)), z, r, 2)
    check_finished(finish(folded(states[::-1])), z, r, 2)


@pytest.mark.parametrize("out", ((0, 8), (8, 16), (16, 24), (0, 16)))
@pytest.mark.parametrize("who", ("both", "reference"))
def test_part_ruled_out_altogether_weighs_nothing(who, out):
    """By the reference alone, the policy's mass there still counts."""
    z, r = rows("flat")
    r[:, slice(*out)] = LOWEST
    if who == "both":
        z[:, slice(*out)] = LOWEST
    states = part_states(z, r, [list(c) for c in SPLITS[0]])
    for order in ORDERS.values():
        check_finished(finish(order(list(states))), z, r, 3)


@pytest.mark.parametrize("columns", (slice(0, 8), slice(8, 16), slice(5, 7), slice(16, 24)))
def test_what_the_policy_alone_rules_out_leaves_lse_alone(columns):
    """The KL is infinite, which the host says by itself (`kl_is_infinite`); log-probabilities still count."""
    z, r = rows("flat")
    z[:, columns] = LOWEST
    states = part_states(z, r, [list(c) for c in SPLITS[0]])
    for order in ORDERS.values():
        found = finish(order(list(states)))
        for i in range(len(z)):
            t = row(z[i], r[i])
            assert close(found.lse_z[i], t.lse_z, EPS, 40 * EPS) and close(found.lse_r[i], t.lse_r, EPS, 40 * EPS)


@pytest.mark.parametrize("split", SPLITS, ids=lambda s: str(len(s)))
@pytest.mark.parametrize("offset", (0.0, 8.0, -3.0, 96.0, -50.0))
def test_equal_models_have_no_kl_whatever_their_offset(offset, split):
    z, r = exact_rows(0.0, offset)
    found = finish(folded(part_states(z, r, [list(c) for c in split])))
    assert not found.kl[:5].count_nonzero() and not found.lse_diff[:5].count_nonzero()


@pytest.mark.parametrize("apart", (2.0**-13, 1e-3, 1e-2, 0.1))
@pytest.mark.parametrize("offset", (0.0, 50.0, -50.0, 96.0))
@pytest.mark.parametrize("V", (24, 500))
def test_an_offset_costs_no_digits(V, offset, apart):
    """Differences that fp32 holds exactly: all that is left is the rounding of sums of small terms."""
    z, r = exact_rows(apart, offset, V)
    pieces = [list(range(k, min(k + V // 3, V))) for k in range(0, V, V // 3)]
    found = [finish(tile_state(z, r)), finish(folded(part_states(z, r, pieces)))]
    for i in range(len(z)):
        t = row(z[i], r[i])
        assert t.lost == 0
        spread = math.fsum(math.exp(t.log_q[v]) * abs(float(z[i, v] - r[i, v]) - (t.m_z - t.m_r)) for v in range(V))
        for f, parts in zip(found, (1, len(pieces)), strict=True):
            more = 8 * math.sqrt(parts)
            assert close(f.kl[i], t.kl, more * EPS), f"row {i}: {f.kl[i]}, wanted {t.kl}"
            assert close(f.lse_diff[i], t.lse_diff, 0, more * EPS * (spread + t.kl)), (
                f"row {i}: {f.lse_diff[i]}, wanted {t.lse_diff}"
            )


NATS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-2, 1.0, 10.0, 27.0, 30.0, 60.0)


def apart_by(nats: float, offset: float) -> tuple[Tensor, Tensor]:
    """Rows of standard size whose KL is about `nats`: noise, or a policy grown sure of one token."""
    z, r = exact_rows(0.0, 0.0, V=96)
    step = torch.randn(5, 96, generator=torch.Generator().manual_seed(5)) if nats < 2 else torch.eye(96)[[90] * 5]
    low, high = 0.0, 200.0
    for _ in range(40):
        middle = (low + high) / 2
        mean = sum(oracle.kl(floats(r[i] + middle * step[i]), floats(r[i])) for i in range(2)) / 2
        low, high = (middle, high) if mean < nats else (low, middle)
    return on_grid(r.double() + low * step + offset, 2.0**-17 if nats < 1e-3 else 2.0**-12).float(), r


@pytest.mark.parametrize("offset", (0.0, 5.0, -50.0))
@pytest.mark.parametrize("nats", NATS)
def test_kl_has_three_digits_from_1e_minus_7_to_60_nats(nats, offset):
    z, r = apart_by(nats, offset)
    states = part_states(z, r, [list(range(k, k + 32)) for k in range(0, 96, 32)])
    for found in (finish(tile_state(z, r)), finish(folded(states)), finish(folded(states[::-1]))):
        for i in range(len(z)):
            want = oracle.kl(floats(z[i]), floats(r[i]))
            assert 0.1 * nats < want < 10 * nats
            assert close(found.kl[i], want, 1e-3), f"row {i}: {found.kl[i]}, wanted {want}"


@triton.jit
def _beyond(lse_z, lse_r, mean, phi, out, N: tl.constexpr):
    at = tl.arange(0, N)
    ends = tl.load(lse_z + at), tl.load(lse_r + at)
    tl.store(out + at, device.kl_of(ends[0], ends[1], tl.load(mean + at), tl.load(phi + at)))
    tl.store(out + N + at, device.lse_diff_of(ends[0], ends[1], tl.load(mean + at), tl.load(phi + at)))


def test_kl_and_lse_diff_lean_on_phi_until_it_is_large():
    """Each branch ignores what the other looks at."""
    phi = torch.tensor([0.0, 1e-9, 1e-3, 1.0, 1e6, 9.9e11, 1.1e12, math.inf])
    lse_z, lse_r, mean = torch.full((8,), 3.0), torch.full((8,), 1.0), torch.full((8,), -70.0)
    out = poisoned(2, 8)
    launch(_beyond, (1,), lse_z, lse_r, mean, phi, out, 8)
    near = [x < LARGE for x in phi.tolist()]
    kl = [math.log1p(x) if small else 72.0 for x, small in zip(phi.tolist(), near, strict=True)]
    check_all(out[0], kl, lambda i: 3 * EPS * kl[i])
    check_all(
        out[1], [x - 70 if small else 2.0 for x, small in zip(kl, near, strict=True)], lambda i: EPS * (70 + 3 * kl[i])
    )


# --- what is staged ---------------------------------------------------------------------------------------------------


@triton.jit
def _log_ratio(z, r, m_z, m_r, lse_diff, out, F, R: tl.constexpr, C: tl.constexpr):
    at, row = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :], tl.arange(0, R)
    m_z, m_r, lse_diff = tl.load(m_z + row), tl.load(m_r + row), tl.load(lse_diff + row)
    z, r, m_z, m_r = device.anchored(tl.load(z + at), tl.load(r + at), m_z, m_r)
    tl.store(out + at, device.log_ratio(z, r, m_z, m_r, lse_diff, F))


@triton.jit
def _weigh(p, q, t, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, device.weigh(tl.load(p + at), tl.load(q + at), tl.load(t + at)))


@triton.jit
def _softmax(x, m, lse, out, R: tl.constexpr, C: tl.constexpr):
    at = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    rows = tl.arange(0, R)
    tl.store(out + at, device.softmax(tl.load(x + at), tl.load(m + rows), tl.load(lse + rows)))


def softmax(x: Tensor, m: Tensor, lse: Tensor) -> Tensor:
    out = torch.full_like(x, math.nan)
    launch(_softmax, (1,), x, m, lse, out, *x.shape)
    return out


def weigh(p: Tensor, q: Tensor, t: Tensor) -> Tensor:
    p, q, t = (padded(x.flatten(), 0.0) for x in (p, q, t))
    out = torch.full_like(p, math.nan)
    launch(_weigh, (1,), p, q, t, out, len(p))
    return out


def staged(z: Tensor, r: Tensor, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    """p and t as `stats.stage` stages them; t rounded to `dtype`."""
    done, (R, V) = finish(tile_state(z, r)), z.shape
    z, r = padded(z, LOWEST), padded(r, LOWEST)
    t = torch.full_like(z, math.nan)
    rows = (x.contiguous() for x in (done.m_z, done.m_r, done.lse_diff))
    launch(_log_ratio, (1,), z, r, *rows, t, F, *z.shape)
    t = t.to(dtype).float()
    p, q = (
        softmax(x, m.contiguous(), lse.contiguous())
        for x, m, lse in ((z, done.m_z, done.lse_z), (r, done.m_r, done.lse_r))
    )
    return weigh(p, q, t)[: p.numel()].view_as(p)[:R, :V], t[:R, :V]


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


def exponent(t: Row, z: float, r: float) -> float:
    """How many eps exp(log p) and exp(log q) may be off: the size of what they are exponentials of."""
    return 4 + abs(z - t.m_z) + abs(r - t.m_r) + t.lse_z + t.lse_r


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


# --- backward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _dz_from_both(z, r, values, out, R: tl.constexpr, C: tl.constexpr):
    at = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    m_z, m_r, lse_z, lse_r, lse_diff, _ = load_six(values, R)
    a, b = tl.load(values + 6 * R + tl.arange(0, R)), tl.load(values + 7 * R + tl.arange(0, R))
    tl.store(out + at, device.dz_from_both(tl.load(z + at), tl.load(r + at), m_z, m_r, lse_z, lse_r, lse_diff, a, b))


@triton.jit
def _part_weights(values, out, N: tl.constexpr):
    at = tl.arange(0, N)
    weights = device.part_weights(tl.load(values + at), tl.load(values + N + at), tl.load(values + 2 * N + at))
    tl.store(out + at, weights[0])
    tl.store(out + N + at, weights[1])
    tl.store(out + 2 * N + at, weights[2])


@triton.jit
def _dz_from_stage(p, t, values, out, R: tl.constexpr, C: tl.constexpr):
    at = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    weight, ref_weight, ratio, a, b, _ = load_six(values, R)
    tl.store(out + at, device.dz_from_stage(tl.load(p + at), tl.load(t + at), weight, ref_weight, ratio, a, b))


def part_weights(values: Tensor) -> Tensor:
    """``(3, N)`` to ``(3, N)``."""
    out = torch.full_like(values, math.nan)
    launch(_part_weights, (1,), values, out, values.shape[1])
    return out


@pytest.mark.parametrize("apart", (0.0, 1e-6, 0.3, -0.9, 1.1, -5.0, 60.0, -300.0))
def test_part_weights(apart):
    """The part's p and q within the whole; from one another by the ratio to all its digits, wherever it is given."""
    lse_r = -torch.arange(8.0)
    lse_diff = torch.full((8,), apart)
    lse_z = torch.minimum((lse_r.double() + lse_diff.double()).float(), torch.tensor(0.0))
    lse_r = (lse_z.double() - lse_diff.double()).float()
    weight, ref_weight, ratio = part_weights(torch.stack([lse_z, lse_r, lse_diff])).double()
    check_all(weight, lse_z.double().exp().tolist(), lambda i: 2 * EPS * float(weight[i]) + 1e-45)
    q = ref_weight * (-ratio).exp()
    check_all(q, lse_r.double().exp().tolist(), lambda i: EPS * float(q[i]) * (8 if abs(apart) < 1 else 2) + 1e-45)
    assert (ratio == torch.tensor(apart).double()).all() if abs(apart) < 1 else not ratio.any()


def coefficients(R: int, what: str) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, R, generator=torch.Generator().manual_seed(8))
    return {"general": (a, b), "kl": (a, 0 * b), "logp": (0 * a, b), "equal": (a, a)}[what]


def dz_from_both(z: Tensor, r: Tensor, a: Tensor, b: Tensor) -> Tensor:
    true, (R, V) = [row(z[i], r[i]) for i in range(len(z))], z.shape
    values = torch.tensor([(t.m_z, t.m_r, t.lse_z, t.lse_r, t.lse_diff, 0.0) for t in true])
    values = padded(torch.cat([values, a[:, None], b[:, None]], 1), 0.0).T.contiguous()
    z, r = padded(z, LOWEST), padded(r, LOWEST)
    out = torch.full_like(z, math.nan)
    launch(_dz_from_both, (1,), z, r, values, out, *z.shape)
    return out[:R, :V]


def dz_from_stage(z: Tensor, r: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, columns: slice) -> Tensor:
    """Of these columns, staged as a part of their own, within the whole."""
    p, t = staged(z[:, columns], r[:, columns], dtype)
    (R, _), values = p.shape, []
    for i in range(R):
        whole, part = row(z[i], r[i]), row(z[i, columns], r[i, columns])
        lse_z, lse_r = part.m_z - whole.m_z + part.lse_z - whole.lse_z, part.m_r - whole.m_r + part.lse_r - whole.lse_r
        values.append((lse_z, lse_r, lse_z - lse_r))
    weights = part_weights(padded(torch.tensor(values), 0.0)[:, :3].T.contiguous())
    weights = torch.cat([weights, *(padded(x, 0.0)[None] for x in (a, b, b))])
    p, t = padded(p, 0.0), padded(t, 0.0)
    out = torch.full_like(p, math.nan)
    launch(_dz_from_stage, (1,), p, t, weights, out, *p.shape)
    return out[:R, : columns.stop - columns.start]


def dz_bound(t: Row, z: Tensor, r: Tensor, v: int, a: float, b: float) -> float:
    """eps times what every exponential's argument amounts to, of p and, unless p and q agree, of q."""
    if t.log_p[v] == -math.inf and t.log_q[v] == -math.inf:
        return 0.0
    size = EPS * exponent(t, *(max(float(x[v]), -1e4) for x in (z, r)))
    p, q = math.exp(t.log_p[v]), math.exp(t.log_q[v])
    return size * (abs(b) * p + abs(a) * (p + q)) + (abs(a) + abs(b)) * 1e-37


def true_dz(z: Tensor, r: Tensor, a: float, b: float, label: int = -1) -> list[float]:
    return oracle.dz(floats(z), floats(r), label, -b, -a)


COEFFICIENTS = ("general", "kl", "logp", "equal")


@pytest.mark.parametrize("gap", (0.0, 104.0, -104.0, 300.0, -300.0))
@pytest.mark.parametrize("what", COEFFICIENTS)
def test_dz_from_both_is_equation_6(what, gap):
    z, r = every_kind()
    z[:, 9] += gap
    a, b = coefficients(len(z), what)
    found = dz_from_both(z, r, a, b)
    for i in range(len(z)):
        t, (x, y) = row(z[i], r[i]), (float(a[i]), float(b[i]))
        check_all(found[i], true_dz(z[i], r[i], x, y), lambda v, i=i, t=t, x=x, y=y: dz_bound(t, z[i], r[i], v, x, y))
        sizes = math.fsum(dz_bound(t, z[i], r[i], v, x, y) for v in range(24))
        assert close(found[i].double().sum(), y, 0, sizes), "with the label's, a row sums to 0"


@pytest.mark.parametrize("apart", (1e-3, 1e-2, 0.1))
@pytest.mark.parametrize("offset", (0.0, 50.0, -50.0))
def test_kl_part_of_dz_keeps_its_digits_where_the_models_nearly_agree(offset, apart):
    """To rounding of the difference itself, not of p; and it sums to 0 to rounding of itself."""
    z, r = exact_rows(apart, offset)
    a, b = coefficients(5, "kl")
    for found in (dz_from_both(z, r, a, b), dz_from_stage(z, r, a, b, F32, slice(0, 24))):
        for i in range(5):
            t = row(z[i], r[i])
            size = max(abs(float(z[i, v] - r[i, v]) - (t.m_z - t.m_r)) for v in range(24)) * abs(float(a[i])) * EPS
            want = true_dz(z[i], r[i], float(a[i]), 0.0)
            check_all(
                found[i], want,
                lambda v, t=t, s=size, w=want: 8 * s * math.exp(t.log_p[v]) + EPS * abs(w[v]) * (8 + abs(t.log_p[v])),
            )  # fmt: skip
            assert close(found[i].double().sum(), 0, 0, 16 * size)


def test_equal_models_have_no_kl_gradient():
    z, r = exact_rows(0.0, 50.0)
    a, b = coefficients(5, "kl")
    assert not dz_from_both(z, r, a, b).count_nonzero()
    assert not dz_from_stage(z, r, a, b, torch.bfloat16, slice(0, 24)).count_nonzero()


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


@pytest.mark.parametrize("gap", (0.0, 104.0, -104.0, 300.0, -300.0))
@pytest.mark.parametrize("columns", (slice(0, 24), slice(8, 16)), ids=("whole", "part"))
def test_dz_from_stage_is_equation_6(columns, gap):
    """In fp32; a log-ratio of g nats is off by eps g."""
    z, r = every_kind()
    z[:, 9] += gap
    a, b = coefficients(len(z), "general")
    found = dz_from_stage(z, r, a, b, F32, columns)
    for i in range(len(z)):
        t, (x, y) = row(z[i], r[i]), (float(a[i]), float(b[i]))
        part = row(z[i, columns], r[i, columns])
        extra = 8 * EPS * (abs(gap) + part.diff_scale + abs(part.m_z - part.m_r) + abs(t.lse_diff) + 16)
        want = true_dz(z[i], r[i], x, y)[columns]

        def bound(v, t=t, i=i, x=x, y=y, extra=extra):
            v += columns.start
            log_p, log_q = t.log_p[v], t.log_q[v]
            grows = math.exp(log_p) * abs(y) + (math.exp(log_p) + math.exp(log_q)) * abs(x)
            return dz_bound(t, z[i], r[i], v, x, y) + extra * grows + 1e-30

        check_all(found[i], want, bound)


@pytest.mark.parametrize("apart", (1e-3, 1e-2, 0.1))
@pytest.mark.parametrize("offset", (0.0, 50.0))
def test_kl_part_of_dz_from_bf16_stays_within_three_per_mille(offset, apart):
    """2^-9 is what rounding t to bf16 costs an entry."""
    z, r = exact_rows(apart, offset, V=96)
    a, b = coefficients(5, "kl")
    found = dz_from_stage(z, r, a, b, torch.bfloat16, slice(0, 96)).double()
    want = torch.tensor([true_dz(z[i], r[i], float(a[i]), 0.0) for i in range(5)], dtype=F64)
    assert ((found - want).norm(dim=1) <= 3e-3 * want.norm(dim=1)).all()
