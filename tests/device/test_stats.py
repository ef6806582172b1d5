"""Statistics of rows by `fused_stats` and `tile_stats`, their states merged, against the scalar oracle."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from exact_problems import PROBLEMS, Problem, made
from harness import EPS, close
from kernel_launches import KEPT, fused_stats, merge_states, tile_stats
from runnable import mainly
from torch import Tensor


def check_statistics(p: Problem, states: Tensor) -> None:
    """Row values against eqs. (1) and (2). The same bits a second time."""
    values, _ = merge_states(p, states)
    assert torch.equal(values[:, : p.T], merge_states(p, states)[0][:, : p.T])
    m_z, m_r, lse_z, lse_r, lse_diff, kl, logp, ref_logp, ratio, *extras = values[:, : p.T].double().tolist()
    more, loss = 4 * math.sqrt(len(states)), p.loss
    for i, t in enumerate(p.true):
        y = int(p.labels[i])
        sums = more * EPS * (1 + math.log(p.V)) + loss
        if not loss:
            assert (m_z[i], m_r[i]) == (t.m_z, t.m_r)
        assert close(m_z[i], t.m_z, 0, loss) and close(m_r[i], t.m_r, 0, loss)
        assert close(lse_z[i], t.lse_z, EPS, sums) and close(lse_r[i], t.lse_r, EPS, sums), f"row {i}"
        lost = t.lost + loss
        bound = more * EPS * t.kl_scale + 2 * lost * math.sqrt(2 * t.kl) + lost**2
        assert close(kl[i], t.kl, 0, bound) and kl[i] >= 0, f"row {i}: {kl[i]}, wanted {t.kl} to {bound}"
        bound = more * EPS * t.diff_scale + 2 * lost
        assert close(lse_diff[i], t.lse_diff, 0, bound), f"row {i}: {lse_diff[i]}, wanted {t.lse_diff} to {bound}"
        away = abs(t.log_p[y]) + abs(t.log_q[y]) + t.lse_z + t.lse_r + abs(t.m_z - t.m_r)
        for found, want in ((logp, t.log_p[y]), (ref_logp, t.log_q[y]), (ratio, t.log_q[y] - t.log_p[y])):
            assert close(found[i], want, 0, bound + sums + 2 * EPS * away + loss), f"row {i}: {found[i]}, wanted {want}"
        check_extras(p, i, *(x[i] for x in extras))


def check_extras(p: Problem, i: int, entropy: float, total: float, is_argmax: float) -> None:
    t, z = p.true[i], p.logits[0][i]
    terms = [-math.exp(x) * x for x in t.log_p if x > -math.inf]
    size = math.fsum(math.exp(x) * (abs(x) + t.lse_z + 1) ** 2 for x in t.log_p if x > -math.inf)
    assert close(entropy, math.fsum(terms), 0, 4 * EPS * (size + math.log(p.V)) + p.loss * (2 + math.sqrt(size))), (
        f"row {i}"
    )
    assert close(total, float(z.sum()), 0, 4 * EPS * float(z.abs().sum()) + p.loss * p.V), f"row {i}"
    if not p.loss:
        assert bool(is_argmax) == (float(z[p.labels[i]]) == t.m_z)


@pytest.mark.parametrize("name", PROBLEMS)
def test_fused_stats(name):
    p = made(name)
    check_statistics(p, fused_stats(p))


@pytest.mark.parametrize("name", mainly(("loved",), ("plain", "loved", "ruled_out")))
def test_many_parts_merge_in_groups(name):
    """As if every column block were there 34 times: 3 parts become 102, in groups whose tops differ."""
    p, times = made(name), 34
    states = fused_stats(p)
    values = merge_states(p, states.repeat_interleave(times, 0))[0][:, : p.T].double()
    once = merge_states(p, states)[0][:, : p.T].double()
    more = math.log(times)
    for i in (2, 3, 9):  # lse_z, lse_r, entropy
        assert (values[i] - once[i] - more).abs().max() <= 32 * EPS * (more + once[i].abs().max())
    for i in (4, 5):  # lse_diff, kl
        assert (values[i] - once[i]).abs().max() <= 32 * EPS * (1 + once[i].abs().max())
    assert (values[10] - times * once[10]).abs().max() <= 32 * EPS * times * once[10].abs().max()


@pytest.mark.parametrize("name", ("plain", "fp16", "plain+one_head", "fp16+one_head"))
def test_fused_stats_from_descriptors_and_from_one_head(name):
    p = made(name)
    states = fused_stats(p)
    check_statistics(p, states)
    assert torch.equal(fused_stats(p, tma=True)[:, :KEPT], states[:, :KEPT])


@pytest.mark.parametrize("name", ("plain", "biased"))
@pytest.mark.parametrize("cuts", ((64,), (32, 64)), ids=str)
def test_windows_of_columns_merge(name, cuts):
    """Each launch has its own first and last column, on a tile's edge or not."""
    p = made(name)
    ends = [0, *(c for c in cuts if c < p.V), p.V]
    windows = list(zip(ends, ends[1:], strict=False))
    check_statistics(p, torch.cat([fused_stats(p, cols=w) for w in windows]))


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("cuts", ((), (32, 64)), ids=str)
def test_tile_stats(name, cuts):
    p = made(name)
    ends = [0, *(c for c in cuts if c < p.V), p.V]
    check_statistics(p, torch.cat([tile_stats(p, w) for w in zip(ends, ends[1:], strict=False)]))


@pytest.mark.parametrize("make", (lambda p, c: fused_stats(p, cols=c), tile_stats), ids=("fused", "rows"))
@pytest.mark.parametrize("cols", ((20, 84), (20, 70)))
def test_label_outside_a_window_adds_nothing(cols, make):
    p = replace(made("biased"), scale=1.0, ref_scale=1.0)
    states = make(p, cols)
    z, r = p.logits
    y = p.labels
    inside = (y >= cols[0]) & (y < cols[1])
    want = [torch.where(inside, x[torch.arange(p.T), y], 0.0) for x in (z, r)]
    assert inside.any() and not inside.all()
    assert torch.equal(states[:, 6:8].sum(0).double(), torch.stack(want))


@pytest.mark.parametrize("name", ("equal", "near_offset"))
def test_equal_models_have_no_kl(name):
    p = made(name)
    if name == "near_offset":
        p = replace(p, ref_bias=torch.full_like(p.ref_bias, 32.0))
    for states in (fused_stats(p), tile_stats(p)):
        values, _ = merge_states(p, states)
        assert not values[[4, 5, 8], : p.T].count_nonzero()
        assert torch.equal(values[6, : p.T], values[7, : p.T])
