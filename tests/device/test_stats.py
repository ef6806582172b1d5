"""States and labels' logits by `fused_stats` and `tile_stats`, merged, against the truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from exact import OUT, PROBLEMS, Problem, biased, made, problem, truth, with_label
from harness import F16, F32
from launches import SMALL, Stats, fused_stats, kept, operands, tile_stats, tiles, whole
from runnable import mainly
from truth import exact

from tdpo_kernels.tuning import TileConfig

BOTH = pytest.mark.parametrize("stats", (fused_stats, tile_stats), ids=("fused", "tile"))


def check(p: Problem, *stats: Stats) -> None:
    """KL and gap to a few eps of themselves, whatever they are; logp to a few eps of what it is from."""
    states, logits = torch.cat([s.states for s in stats]), _joined([s.label_logits for s in stats])
    assert states.isfinite().all() and (states[:, 4] >= 0).all()
    whole = with_label(states, logits)
    kl, t = whole[4], p.true
    assert (np.abs(kl - t.kl) <= 2e-6 * t.kl + 1e-30).all(), f"KL {kl}, wanted {t.kl}"
    want = np.log(np.exp(t.log_p - t.log_p.max(1, keepdims=True)).sum(1))
    assert np.abs(whole[2] - want).max() <= 1e-6
    with np.errstate(invalid="ignore"):
        spread = np.abs(np.where(t.q > 0, t.q * (t.log_p - t.log_q), 0)).sum(1) + t.kl
    gap = -(t.log_p.max(1) - t.log_q.max(1))
    assert (np.abs(whole[5] - gap) <= 1e-6 * (spread + 1e-9)).all()
    for i, log in enumerate((t.log_p, t.log_q)):
        logp = logits[i].double().numpy() - whole[i] - whole[2 + i]
        log_y = log[range(p.T), p.labels]
        assert (np.abs(logp - log_y) <= 1e-6 * (1 + np.abs(log_y))).all()
    check_extras(p, states, logits, whole)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Each label's logits are written once."""
    all_of = torch.stack(parts)
    assert ((~all_of.isnan()).sum(0) == 1).all()
    return all_of.nansum(0)


def check_extras(p: Problem, states: torch.Tensor, logits: torch.Tensor, whole: np.ndarray) -> None:
    """``H = sum P_k (H_k - log P_k)``, the label being a part without entropy."""
    s, t, z = states.double().numpy(), p.true, p.logits[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        log_P = s[:, 0] - whole[0] + s[:, 2] - whole[2]
        log_y = logits[0].double().numpy() - whole[0] - whole[2]
        entropy = (np.exp(log_P) * (s[:, 6] - log_P)).sum(0) - np.exp(log_y) * log_y
        want = -np.where(t.p > 0, t.p * t.log_p, 0).sum(1)
    assert np.abs(entropy - want).max() <= 1e-5
    total, size = s[:, 7].sum(0) + logits[0].double().numpy(), np.abs(np.maximum(z, -1e30)).sum(1)
    assert (np.abs(total - np.maximum(z, -1e30).sum(1)) <= 1e-6 * size).all()


@BOTH
@pytest.mark.parametrize("name", PROBLEMS)
def test_statistics(name, stats):
    check(made(name), stats(made(name)))


@BOTH
@pytest.mark.parametrize("ends", ((32, 64), (20, 70)), ids=str)
@pytest.mark.parametrize("name", ("biased", "near_1e-4_7"))
def test_blocks_of_columns(name, ends, stats):
    """Labels count from the vocabulary's first column, and each is written by the block that has it."""
    p = made(name)
    cuts = [0, *ends, p.V]
    check(p, *(stats(p, slice(*block)) for block in zip(cuts, cuts[1:], strict=False)))


@BOTH
@pytest.mark.parametrize("label", (-1, -100, 86, 87, 95, 10**6))
def test_labels_that_are_elsewhere_mask_nothing(label, stats):
    """Not even in a tile's columns past the last one."""
    p = replace(made("general"), labels=torch.full((21,), label))
    found = stats(p)
    assert found.label_logits.isnan().all()
    apart = with_label(found.states, torch.full((2, p.T), -1e30))
    assert (np.abs(apart[4] - p.true.kl) <= 2e-6 * p.true.kl).all()


@BOTH
def test_the_label_alone(stats):
    """V = 1: what is left is a part of no mass."""
    p = problem("general", T=5, V=1)
    found = stats(p)
    state = with_label(found.states, found.label_logits)
    assert (found.states[:, :2] == -1e30).all() and found.states.isfinite().all()
    assert not state[2:].any() and (state[0] == found.label_logits[0].double().numpy()).all()


@BOTH
@pytest.mark.parametrize("offset", (0, 1, 1000))
def test_equal_models_have_no_kl(offset, stats):
    p = problem(f"near_0_{offset}")
    r = (p.products[0] * 64).round() / 64  # so coarse that the offset is the same everywhere
    found = stats(replace(p, products=(r + offset, r), weights={}))
    assert not found.states[:, 4:6].count_nonzero()


@BOTH
def test_a_column_that_a_bias_rules_out_is_lowest_whatever_scale_and_softcap_say(stats):
    p = biased(problem("general"), OUT, scales=(0.0, -0.5), softcaps=(30.0, 30.0))
    found = stats(replace(p, labels=torch.full_like(p.labels, OUT[0])))
    assert (found.label_logits == -1e30).all()
    check(p, stats(p))


@pytest.mark.parametrize("dtype", (F32, F16))
def test_descriptors_and_what_is_kept_change_no_bit(dtype):
    p = replace(made("biased"), dtype=dtype, biases=tuple(b.to(dtype) for b in made("biased").biases), weights={})
    want, cols = fused_stats(p), whole(p)
    for tile in (SMALL, TileConfig(16, 32, 16, tma=True)):
        room = kept(p, cols)
        found = fused_stats(p, kept=room, tile=tile)
        assert torch.equal(found.states, want.states) and torch.equal(found.label_logits, want.label_logits)
        assert (
            torch.equal(room, tiles(p, cols)) and room.as_strided((2, p.T, 96), room.stride())[..., 86:].isnan().all()
        )


def test_one_weight_for_both_heads_is_loaded_once_and_is_the_same():
    p = problem("general", T=16, V=70)
    h, w, g, u = operands(p, whole(p), one_head=True)
    products = tuple((x.double() @ y.double().T).float() for x, y in ((h, w), (g, u)))
    found = fused_stats(p, one_head=True)
    state = with_label(found.states, found.label_logits)
    want = truth(*(exact(x) for x in products)).kl
    assert w.data_ptr() != u.data_ptr()  # only `u` tells them to be one
    assert (np.abs(state[4] - want) <= 1e-4 * want + 1e-7).all()


@pytest.mark.parametrize("tile", mainly((TileConfig(32, 128, 8),), (TileConfig(32, 128, 8), TileConfig(16, 16, 32))))
def test_any_tile(tile):
    p = made("peaked")
    check(p, fused_stats(p, tile=tile))


@BOTH
@pytest.mark.parametrize("who", (0, 1))
def test_nan_comes_out_as_nan(who, stats):
    p = problem("general")
    products = [x.clone() for x in p.products]
    products[who][3, 40] = torch.nan
    found = stats(replace(p, products=tuple(products), weights={}))
    # as a weight's column, it is in every row that the identity multiplies with 0
    if stats is tile_stats:
        rows = [i for i in range(p.T) if i != 3]
        assert found.states[:, 4:6, 3].isnan().any() and found.states[:, :, rows].isfinite().all()
    assert found.states[:, who + 2].isnan().any()
