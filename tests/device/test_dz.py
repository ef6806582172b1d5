"""dz by `fused_dz`, `tile_dz` and `staged_dz`, against the scalar oracle."""

from __future__ import annotations

import pytest
import torch
from exact_dz import COTANGENTS, check_dz, check_row_sums, made_backward
from exact_problems import BF16, PROBLEMS, STAGED, made
from harness import EPS, F16, F32
from kernel_launches import fused_dz, row_values, staged_dz, tile_dz, windows

DZ = [(name, "general") for name in PROBLEMS]
DZ += [(name, what) for name in ("plain", "softcap") for what in COTANGENTS if what != "general"]


@pytest.mark.parametrize(("name", "what"), DZ)
def test_fused_dz(name, what):
    p, want = made(name), made_backward(name, what)
    values = row_values(p)
    found = fused_dz(p, values, want, (0, p.V), tma=False)
    check_dz(found, want, (0, p.V))
    if p.softcap is None:
        check_row_sums(found[:, : p.V], want)
    if name == "biased":
        check_dz(fused_dz(p, values, want, (20, 70), tma=False), want, (20, 70))


@pytest.mark.parametrize("name", ("fp16", "softcap"))
def test_fused_dz_from_descriptors_is_the_same_to_the_bit(name):
    p, want = made(name), made_backward(name, "blocks")
    values = row_values(p)
    one, other = (fused_dz(p, values, want, (0, p.V), tma)[:, : p.V] for tma in (False, True))
    assert torch.equal(one, other)


def test_fused_dz_in_sixteen_bits_is_the_same_rounded():
    p, want = made("fp16"), made_backward("fp16", "general")
    values = row_values(p)
    full, half = (fused_dz(p, values, want, (0, p.V), False, dtype)[:, : p.V] for dtype in (F32, F16))
    assert torch.equal(full.to(F16), half)


@pytest.mark.parametrize(("name", "what"), DZ)
def test_tile_dz(name, what):
    """From the tiles that are needed only."""
    p, want = made(name), made_backward(name, what)
    values = row_values(p)
    needs_z, needs_r = what != "equal" or p.softcap is not None, what not in ("kl_zero", "zero")
    for cols in windows(p):
        check_dz(tile_dz(p, values, want, cols, needs_z, needs_r), want, cols)


@pytest.mark.parametrize("name", STAGED)
def test_staged_dz(name):
    """In fp32: to the rounding of t, which is a few nats, or hundreds."""
    p, want = made(name), made_backward(name, "general")
    for cols in windows(p):
        found = staged_dz(p, want, cols, F32)
        more = 1 + 4 * max(t.kl + abs(t.m_z - t.m_r) for t in p.true)
        check_dz(found, want, cols, 4 + more, 8 * EPS)


@pytest.mark.parametrize("name", ("plain", "near_offset", "softcap"))
def test_staged_dz_from_bf16_is_within_three_per_mille(name):
    p, want = made(name), made_backward(name, "logp_zero")
    found = staged_dz(p, want, (0, p.V), BF16)[:, : p.V].double()
    assert (found - want.true).norm() <= 3e-3 * want.true.norm()


@pytest.mark.parametrize("name", ("near", "near_offset"))
def test_kl_gradient_keeps_its_digits_where_the_models_nearly_agree(name):
    p, want = made(name), made_backward(name, "logp_zero")
    values = row_values(p)
    pair = [fused_dz(p, values, want, (0, p.V), False), tile_dz(p, values, want, (0, p.V), True, True)]
    for found in (*pair, staged_dz(p, want, (0, p.V), F32)):
        error = (found[:, : p.V].double() - want.true).norm(dim=1)
        assert (error <= 16 * EPS * want.true.norm(dim=1)).all()


def test_equal_models_have_no_kl_gradient():
    p, want = made("equal"), made_backward("equal", "logp_zero")
    values = row_values(p)
    assert not want.true.count_nonzero()
    for found in (
        fused_dz(p, values, want, (0, p.V), False), tile_dz(p, values, want, (0, p.V), True, True),
        staged_dz(p, want, (0, p.V), BF16),
    ):  # fmt: skip
        assert not found[:, : p.V].count_nonzero()
