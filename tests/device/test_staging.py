"""What `fused_stats` and `tile_stats` stage for backward, and the weights of staged tiles."""

from __future__ import annotations

import math

import pytest
import torch
from exact_problems import BF16, STAGED, C, Problem, made
from harness import EPS, F16, F32, F64, close
from kernel_launches import KEPT, fused_stats, merge_states, planes, tile_stats
from torch import Tensor

from tdpo_kernels.backends.tile_math import LOWEST


@pytest.mark.parametrize("name", ("plain", "near", "softcap"))
def test_staging_changes_no_statistic_to_the_bit(name):
    p = made(name)
    assert torch.equal(fused_stats(p, planes(p, p.V, F32))[:, :KEPT], fused_stats(p)[:, :KEPT])


def check_planes(p: Problem, staged: Tensor, cols: tuple[int, int], width: int) -> None:
    """Of each tile: t its own log-ratio, p such that p e^-t is q, and the slope; nothing outside."""
    first, last = cols
    assert staged[..., last - first :].isnan().all() and not staged[..., : last - first].isnan().any()
    eps = torch.finfo(staged.dtype).eps / 2 + 8 * EPS
    for start in range(first, last, width):
        stop = min(start + width, last)
        for i, part in enumerate(p.truth(slice(start, stop)) if _some(p, start, stop) else []):
            at = slice(start - first, stop - first)
            weight, t = (x.double().tolist() for x in staged[:2, i, at])
            for v in range(stop - start):
                log_p, log_q = part.log_p[v], part.log_q[v]
                if log_p == -math.inf:
                    continue
                want, exact = max(log_p - log_q, -p.F), 16 * EPS * (4 + part.diff_scale + abs(log_p) + abs(log_q))
                exact += p.loss + part.rounding[v] + part.lost
                assert close(t[v], want, eps, exact), f"row {i}, column {start + v}: t {t[v]}, wanted {want}"
                if want > -p.F:
                    off = eps + exact * 4 + abs(t[v] - want)
                    assert close(
                        weight[v], math.exp(log_p), 2 * math.expm1(off), 1e-7 if staged.dtype == F16 else 1e-36
                    )
                if t[v] <= 0:
                    assert close(weight[v] * math.exp(-t[v]), math.exp(log_q), eps + 4 * exact, 1e-30 * math.exp(-t[v]))
    if p.softcap is not None:
        found = staged[2, :, : last - first].double()
        assert (found - p.slope[:, first:last]).abs().max() <= eps + 2 * p.loss / p.softcap


def _some(p: Problem, start: int, stop: int) -> bool:
    return all(bool((x[:, start:stop] > LOWEST / 10).any()) for x in p.logits)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("name", STAGED)
def test_what_is_staged(name, dtype):
    p = made(name)
    cols = (20, 70) if p.V > 70 else (0, p.V)
    staged = planes(p, cols[1] - cols[0], dtype)
    fused_stats(p, staged, cols)
    check_planes(p, staged, cols, C)
    staged = planes(p, cols[1] - cols[0], dtype)
    tile_stats(p, cols, staged)
    check_planes(p, staged, cols, cols[1] - cols[0])


@pytest.mark.parametrize("name", STAGED)
def test_weights_of_staged_tiles(name):
    """p and q of a tile within the whole, q as its weight times e^-ratio; of the first `staged` parts."""
    p = made(name)
    states = fused_stats(p, planes(p, p.V, F32))
    _, weights = merge_states(p, states, 2)
    for k in range(2):
        if not _some(p, k * C, min((k + 1) * C, p.V)):
            continue
        for i, part in enumerate(p.truth(slice(k * C, (k + 1) * C))):
            t, (weight, ref_weight, ratio) = p.true[i], weights[k, :, i].double().tolist()
            log_p, log_q = part.m_z + part.lse_z - t.m_z - t.lse_z, part.m_r + part.lse_r - t.m_r - t.lse_r
            off = 16 * EPS * (4 + t.diff_scale + part.diff_scale + abs(log_p) + abs(log_q)) + 2 * p.loss
            assert close(weight, math.exp(log_p), off, 1e-36), f"tile {k}, row {i}: {weight}"
            assert close(ref_weight * math.exp(-ratio), math.exp(log_q), off, 1e-36), f"tile {k}, row {i}: {ref_weight}"


@pytest.mark.parametrize("build", ("fused", "tile"))
@pytest.mark.parametrize("name", ("plain", "near"))
def test_what_sixteen_bits_took_from_a_row_is_made_up_for(name, build):
    """In each tile, but for the label's entry, which backward has in full: the sum of p, and by how much that of q is
    another."""
    p, make, width = made(name), fused_stats, C
    if build == "tile":
        make, width = tile_stats, p.V
    staged = planes(p, p.V, BF16)
    states = make(p, staged=staged)
    _, weights = merge_states(p, states, len(states))
    true_p, true_q = (torch.tensor([getattr(t, x) for t in p.true], dtype=F64).exp() for x in ("log_p", "log_q"))
    others = torch.arange(p.V) != p.labels[:, None]
    for k, start in enumerate(range(0, p.V, width)):
        cols = slice(start, min(start + width, p.V))
        weight, ref_weight, ratio = weights[k, :, : p.T, None].double()
        kept, t = staged[:2, :, cols].double()
        found_p, found_q = weight * kept, ref_weight * kept * torch.exp(-t - ratio)
        pairs = (found_p, true_p[:, cols]), (found_q - found_p, (true_q - true_p)[:, cols])
        for found, true in pairs:
            off = ((found - true) * others[:, cols]).sum(1).abs() / ((true_p + true_q) * others)[:, cols].sum(1)
            assert off.max() <= 32 * EPS, f"tile {k}: {off.max()}"
