"""States of a row's statistics: made of a tile, merged in any order, finished into KL and log-sum-exps."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
import triton
import triton.language as tl
from harness import (
    EPS,
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
    row,
    rows,
)
from hypothesis import given
from hypothesis import strategies as st
from math_launches import LARGE, Finished, empty, finish, merge, tile_state
from runnable import mainly
from torch import Tensor

from tdpo_kernels.backends.tile_math import LOWEST
from tdpo_kernels.device import math as device

ORACLE = 2.0**-48  # what its log-sum-exp in float64 is off by


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


def test_parts_whose_tops_differ_keep_what_nearly_agrees():
    """The merged L - L' has the digits of the log-ratios, though each part's tops are rounded to its row's."""
    z, noise = torch.randn(2, 8, 48, generator=torch.Generator().manual_seed(0))
    z[:, ::3] += 3.3
    r = z + 1e-4 * noise
    pieces = [[*range(i, 48, 3)] for i in range(3)]
    found = finish(folded(part_states(z, r, pieces)))
    tops = torch.stack([found.m_z, found.m_r]).double()
    want = torch.sub(*(torch.stack([z, r]).double().logsumexp(-1) - tops[:, : len(z)]))
    assert (found.lse_diff[: len(z)] - want).abs().max() <= 16 * EPS * 1e-4


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
