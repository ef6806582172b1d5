"""dz by `fused_dz` and `tile_dz`, against the truth, and against one another to the bit."""

from __future__ import annotations

import mmap
import sys
from dataclasses import replace

import launches
import numpy as np
import pytest
import torch
from exact import PROBLEMS, Array, Problem, made, problem
from harness import F16
from launches import SMALL, dz_room, fused_dz, fused_stats, kept, row_values, tile_dz, tile_stats, tiles, whole
from runnable import mainly
from torch import Tensor
from truth import exact

from tdpo_kernels.tuning import TileConfig

BOTH = pytest.mark.parametrize("dz", (fused_dz, tile_dz), ids=("fused", "tile"))
COTANGENTS = ("general", "logp_zero", "kl_zero", "equal", "close", "blocks", "mixed", "zero")


def cotangents(what: str, T: int) -> tuple[Tensor, Tensor]:
    """g_logp and g_kl, of one kind, or of each kind by turns: for a program's rows, or row by row."""
    g_logp, g_kl = torch.randn(2, T, generator=torch.Generator().manual_seed(4))
    zero = torch.zeros(T)
    kinds = {
        "general": (g_logp, g_kl), "logp_zero": (zero, g_kl), "kl_zero": (g_logp, zero), "equal": (g_logp, g_logp),
        "close": (g_logp, g_logp * (1 + 2.0**-23)), "zero": (zero, zero),
    }  # fmt: skip
    if what in kinds:
        return kinds[what]
    turn = torch.arange(T) // (SMALL.R if what == "blocks" else 1) % len(kinds)
    return tuple(torch.stack([pair[i] for pair in kinds.values()])[turn, torch.arange(T)] for i in range(2))


def true_dz(p: Problem, g_logp: Tensor, g_kl: Tensor) -> Array:
    true = p.true.dz(p.labels, exact(g_logp), exact(g_kl))
    if p.softcaps[0] is None:
        return true
    u = np.maximum(p.logits[0] / p.softcaps[0], -2)
    return np.where(np.abs(u) < 1, (1 - u * u) * true, 0)


def check(found: Tensor, true: Array) -> None:
    error, size = np.abs(exact(found) - true), np.abs(true)
    assert (error.sum(1) <= 2e-6 * size.sum(1) + 1e-36).all(), f"{error.sum(1)}, {size.sum(1)}"
    assert (error.max(1) <= 2e-6 * size.max(1) + 1e-36).all()


SOME = ("peaked", "near_1e-4_7", "near_1e-3_1000", "sure_20", "loved_45", "hated_104", "fp16", "ruled_out", "softcap")


@BOTH
@pytest.mark.parametrize("what", ("general", "logp_zero", "close"))
@pytest.mark.parametrize("name", mainly(SOME, PROBLEMS))
def test_dz(name, what, dz):
    p, g = made(name), cotangents(what, made(name).T)
    found = dz(p, row_values(p, *g))
    check(found, true_dz(p, *g))
    if p.softcaps[0] is None:
        assert (found.double().sum(1).abs() <= 1e-6 * found.double().abs().sum(1) + 1e-36).all()


@BOTH
@pytest.mark.parametrize("what", ("kl_zero", "equal", "blocks", "mixed", "zero"))
@pytest.mark.parametrize("name", ("peaked", "softcap", "loved_45"))
def test_rows_that_need_one_model_or_none(name, what, dz):
    p, g = made(name), cotangents(what, made(name).T)
    check(dz(p, row_values(p, *g)), true_dz(p, *g))


@BOTH
@pytest.mark.parametrize("what", ("equal", "zero"))
def test_a_softcap_has_its_slope_whatever_else_a_row_can_do_without(what, dz):
    """The policy's logits, though their softmax is not needed; also where the label alone has a gradient, or none."""
    p, g = made("softcap"), cotangents(what, 21)
    rows, true = row_values(p, *g), true_dz(p, *g)
    one = 1.0 if what == "zero" else 0.0
    rows[8], label = one, np.arange(p.V) == p.labels.numpy()[:, None]
    slope = np.maximum(1 - (p.logits[0] / p.softcaps[0]) ** 2, 0)
    check(dz(p, rows), np.where(label, one * slope, true))


@BOTH
@pytest.mark.parametrize("cols", (slice(0, 64), slice(20, 70), slice(64, 86)), ids=str)
def test_blocks_of_columns(cols, dz):
    for name in ("biased", "softcap"):
        p, g = made(name), cotangents("general", 21)
        rows = row_values(p, *g)
        assert torch.equal(dz(p, rows, cols), dz(p, rows)[:, cols])


@BOTH
def test_equal_models_have_no_kl_gradient(dz):
    """Whatever the offset; from the state of a whole row that the label has joined."""
    p = problem("near_0_0")
    r = (p.products[0] * 64).round() / 64
    p = replace(p, products=(r + 1000, r), weights={})
    rows = row_values(p, *cotangents("logp_zero", p.T))
    assert not rows[8].count_nonzero() and not dz(p, rows).count_nonzero()


@BOTH
def test_rows_of_no_cotangent_have_no_gradient_however_low_their_logits(dz):
    """Alone among those of a program, whose products are not made, 0 x e^-L would be 0 x inf."""
    p = problem("general")
    p = replace(p, products=tuple(x - 200 for x in p.products), weights={})
    for counts in (torch.arange(p.T) < SMALL.R, torch.arange(p.T) % 3 == 0):
        g = tuple(torch.where(counts, x, 0.0) for x in cotangents("general", p.T))
        found = dz(p, row_values(p, *g))
        check(found, true_dz(p, *g))
        assert not found[~counts].count_nonzero()


# --- bits -------------------------------------------------------------------------------------------------------------

SIZES = (SMALL, TileConfig(16, 64, 32), TileConfig(32, 32, 8), TileConfig(16, 32, 16, tma=True))


@pytest.mark.parametrize("tile", mainly(SIZES[::3], SIZES), ids=str)
@pytest.mark.parametrize("name", ("peaked", "fp16", "softcap", "loved_300", "reference_out", "near_1e-3_1000"))
def test_from_what_is_kept_dz_has_the_same_bits(name, tile):
    p, cols = made(name), whole(made(name))
    for what in ("general", "mixed"):
        room = kept(p, cols)
        rows = row_values(p, *cotangents(what, p.T), fused_stats(p, kept=room, tile=tile))
        assert torch.equal(fused_dz(p, rows, tile=tile), tile_dz(p, rows, given=room))


@pytest.mark.parametrize("name", ("peaked", "softcap", "loved_45"))
@pytest.mark.parametrize("what", ("kl_zero", "equal"))
def test_a_row_has_the_same_bits_whoever_is_in_its_block(name, what):
    """It has them whether or not other rows need the model that it can do without."""
    p, alone = made(name), cotangents(what, made(name).T)
    others = [torch.where(torch.arange(p.T) % 2 == 0, *x) for x in zip(alone, cotangents("general", p.T), strict=True)]
    rows, mixed = row_values(p, *alone), row_values(p, *others)
    needs = (what != "equal" or p.softcaps[0] is not None, what == "equal")
    for found in (tile_dz(p, mixed), fused_dz(p, mixed)):
        assert torch.equal(found[::2], fused_dz(p, rows)[::2])
        assert torch.equal(found[::2], tile_dz(p, rows, needs=needs)[::2])


@pytest.mark.parametrize("what", ("blocks", "kl_zero", "equal", "zero"))
def test_a_model_that_no_row_of_a_program_needs_is_not_multiplied(what):
    """It may as well be NaN, where it is not asked for its softcap's slope."""
    p = made("general")
    g = cotangents(what, p.T)
    g = tuple(torch.where(torch.arange(p.T) < SMALL.R, x, 0.0) for x in g) if what == "blocks" else g
    want = fused_dz(p, rows := row_values(p, *g))
    unused = {"kl_zero": (1,), "equal": (0,), "zero": (0, 1), "blocks": ()}[what]
    products = tuple(torch.full_like(x, torch.nan) if i in unused else x for i, x in enumerate(p.products))
    assert torch.equal(fused_dz(replace(p, products=products, weights={}), rows), want)


def test_dz_in_sixteen_bits_is_the_same_rounded():
    p = made("fp16")
    rows = row_values(p, *cotangents("general", p.T))
    assert torch.equal(fused_dz(p, rows).to(F16), fused_dz(p, rows, dtype=F16))


# --- more than 2^31 elements ------------------------------------------------------------------------------------------

MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # `mmap` has its name since Python 3.13


def far_apart(x: Tensor, _: int = 0) -> Tensor:
    """x, its last row 2^31 elements or more behind its first, in memory that is not there until it is touched."""
    rows, cols = x.shape[-2:]
    stride = (2**31 // max(rows - 1, 1) // 16 + 1) * 16
    size = (rows - 1) * stride + x.shape[:-2].numel() * cols
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    room = torch.frombuffer(mmap.mmap(-1, size * x.itemsize, flags), dtype=x.dtype)
    return room.as_strided(x.shape, (*[cols] * (x.dim() - 2), stride, 1)).copy_(x)


def test_matrices_of_more_than_two_to_the_31_elements(monkeypatch):
    """Whatever is loaded, kept or written, by row: an offset in 32 bits would wrap around."""
    p = made("softcap")
    rows, cols = row_values(p, *cotangents("general", p.T)), slice(20, 70)

    def everything() -> list[Tensor]:
        room, pair = launches.kept(p, cols), launches.tiles(p, cols)
        states = [fused_stats(p, cols, room).states, tile_stats(p, cols).states]
        return [*states, fused_dz(p, rows, cols), tile_dz(p, rows, cols, given=pair), room]

    near = everything()
    for name, build in dict(kept=kept, tiles=tiles, dz_room=dz_room).items():
        monkeypatch.setattr(launches, name, lambda *args, build=build: far_apart(build(*args)))
    monkeypatch.setattr(launches, "strided", far_apart)
    far = everything()
    assert all(torch.equal(x.nan_to_num(9.0), y.nan_to_num(9.0)) for x, y in zip(near, far, strict=True))
    assert all(x.stride(-2) * (p.T - 1) >= 2**31 for x in far[2:])
