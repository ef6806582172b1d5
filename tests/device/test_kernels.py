"""What laws do not reach of the kernels: other configurations, memory among NaN, offsets beyond 2^31, work left out.

That their numbers are right are laws 1 to 3: `test_accuracy`, `test_exactness`, `test_equality` and `test_bits` hold
them where kernels are interpreted, with every address checked (`interpreted.check_addresses`).
"""

from __future__ import annotations

import mmap
import sys
from dataclasses import replace

import launches
import pytest
import torch
from harness import F16, F32
from launches import (
    SMALL,
    Problem,
    dz_room,
    fused_dz,
    fused_stats,
    kept,
    operands,
    problem,
    row_values,
    tile_dz,
    tile_stats,
    tiles,
    whole,
)
from torch import Tensor

from tdpo_kernels.tuning import TileConfig

STATS = pytest.mark.parametrize("stats", (fused_stats, tile_stats), ids=("fused", "tile"))
DZ = pytest.mark.parametrize("dz", (fused_dz, tile_dz), ids=("fused", "tile"))
SIZES = (TileConfig(16, 64, 32), TileConfig(32, 128, 8), TileConfig(16, 32, 16, tma=True))


def cotangents(what: str, T: int) -> tuple[Tensor, Tensor]:
    """g_logp and g_kl, of one kind, or of each kind by turns: for a program's rows, or row by row."""
    g_logp, g_kl = torch.randn(2, T, generator=torch.Generator().manual_seed(4))
    zero = torch.zeros(T)
    kinds = {"general": (g_logp, g_kl), "kl_zero": (g_logp, zero), "equal": (g_logp, g_logp), "zero": (zero, zero)}
    if what in kinds:
        return kinds[what]
    turn = torch.arange(T) // (SMALL.R if what == "blocks" else 1) % len(kinds)
    return tuple(torch.stack([pair[i] for pair in kinds.values()])[turn, torch.arange(T)] for i in range(2))


# --- statistics -------------------------------------------------------------------------------------------------------


@STATS
def test_labels_that_are_elsewhere_mask_nothing(stats):
    """Not even in a tile's columns past the last one."""
    labels = torch.tensor([-100, 86, 87, 95, 10**6, 2**31, -(2**31)] * 3)
    found, none = (stats(replace(problem(), labels=x)) for x in (labels, torch.full((21,), -1)))
    assert torch.equal(found.states, none.states) and found.label_logits.isnan().all()
    assert not torch.equal(found.states, stats(problem()).states)


@pytest.mark.parametrize("dtype", (F32, F16))
@pytest.mark.parametrize("tile", (SMALL, *SIZES), ids=str)
def test_what_is_kept_is_the_product_and_changes_nothing(tile: TileConfig, dtype: torch.dtype):
    """Nor does the configuration, but for the parts that states are of."""
    p = problem("capped", dtype=dtype)
    room, want = kept(p, whole(p)), fused_stats(p)
    found, without = fused_stats(p, kept=room, tile=tile), fused_stats(p, tile=tile)
    assert torch.equal(found.states, without.states) and torch.equal(found.label_logits, want.label_logits)
    assert torch.equal(room, tiles(p, whole(p)))
    assert room.as_strided((2, p.T, 96), room.stride())[..., 86:].isnan().all()
    torch.testing.assert_close(found.row, want.row, rtol=1e-5, atol=1e-6)


def test_one_weight_for_both_heads_is_loaded_once_and_is_the_same():
    p = problem()
    found, alike = fused_stats(p, one_head=True), fused_stats(replace(p, products=(p.products[0],) * 2))
    _, w, _, u = operands(p, whole(p), one_head=True)
    assert w.data_ptr() != u.data_ptr()  # only `u` tells them to be one
    assert torch.equal(found.states, alike.states) and torch.equal(found.label_logits, alike.label_logits)


@STATS
@pytest.mark.parametrize("who", (0, 1))
def test_nan_comes_out_as_nan(who: int, stats):
    p = problem()
    products = [x.clone() for x in p.products]
    products[who][3, 40] = torch.nan
    found = stats(replace(p, products=tuple(products)))
    # as a weight's column, it is in every row that the identity multiplies with 0
    if stats is tile_stats:
        rows = [i for i in range(p.T) if i != 3]
        assert found.states[:, 4:6, 3].isnan().any() and found.states[:, :, rows].isfinite().all()
    assert found.states[:, who + 2].isnan().any()


# --- dz ---------------------------------------------------------------------------------------------------------------


@DZ
def test_rows_of_no_cotangent_have_no_gradient_however_low_their_logits(dz):
    """Alone among those of a program, whose products are not made, 0 x e^-L would be 0 x inf."""
    p = problem()
    p = replace(p, products=tuple(x - 200 for x in p.products))
    for counts in (torch.arange(p.T) < SMALL.R, torch.arange(p.T) % 3 == 0):
        found = dz(p, row_values(p, *(torch.where(counts, x, 0.0) for x in cotangents("general", p.T))))
        assert found.isfinite().all() and found[counts].any(1).all() and not found[~counts].count_nonzero()


@DZ
def test_a_softcap_has_its_slope_where_the_label_has_no_gradient(dz):
    """The policy's logits are needed for it, though neither its softmax nor the label asks for them."""
    p = problem("capped")
    rows, others = row_values(p, *cotangents("equal", p.T)), torch.arange(p.V) != p.labels[:, None]
    full = dz(p, rows)
    rows[8] = 0
    assert torch.equal(dz(p, rows)[others], full[others])


@pytest.mark.parametrize("tile", SIZES, ids=str)
@pytest.mark.parametrize("name", ("peaked", "capped", "loved"))
def test_from_what_is_kept_dz_has_the_same_bits(name: str, tile: TileConfig):
    """In 16 bits they are the same, rounded."""
    p = problem(name)
    room = kept(p, whole(p))
    rows = row_values(p, *cotangents("mixed", p.T), fused_stats(p, kept=room, tile=tile))
    found = tile_dz(p, rows, given=room)
    assert torch.equal(fused_dz(p, rows, tile=tile), found)
    assert torch.equal(fused_dz(p, rows, tile=tile, dtype=F16), found.to(F16))


@pytest.mark.parametrize("name", ("capped", "loved"))
@pytest.mark.parametrize("what", ("kl_zero", "equal"))
def test_a_row_has_the_same_bits_whoever_is_in_its_block(name: str, what: str):
    """It has them whether or not other rows need the model that it can do without."""
    p, alone = problem(name), cotangents(what, 21)
    others = [torch.where(torch.arange(p.T) % 2 == 0, *x) for x in zip(alone, cotangents("general", p.T), strict=True)]
    rows, mixed = row_values(p, *alone), row_values(p, *others)
    needs = (what != "equal" or p.softcap is not None, what == "equal")
    for found in (tile_dz(p, mixed), fused_dz(p, mixed)):
        assert torch.equal(found[::2], fused_dz(p, rows)[::2])
        assert torch.equal(found[::2], tile_dz(p, rows, needs=needs)[::2])


@pytest.mark.parametrize("what", ("blocks", "kl_zero", "equal", "zero"))
def test_a_model_that_no_row_of_a_program_needs_is_not_multiplied(what: str):
    """It may as well be NaN, where it is not asked for its softcap's slope."""
    p = problem()
    g = cotangents(what, p.T)
    g = tuple(torch.where(torch.arange(p.T) < SMALL.R, x, 0.0) for x in g) if what == "blocks" else g
    want = fused_dz(p, rows := row_values(p, *g))
    unused = {"kl_zero": (1,), "equal": (0,), "zero": (0, 1), "blocks": ()}[what]
    products = tuple(torch.full_like(x, torch.nan) if i in unused else x for i, x in enumerate(p.products))
    assert torch.equal(fused_dz(replace(p, products=products), rows), want)


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


def everything(p: Problem, rows: Tensor, cols: slice) -> list[Tensor]:
    room, pair = launches.kept(p, cols), launches.tiles(p, cols)
    states = [fused_stats(p, cols, room).states, tile_stats(p, cols).states]
    return [*states, fused_dz(p, rows, cols), tile_dz(p, rows, cols, given=pair), room]


def test_matrices_of_more_than_two_to_the_31_elements(monkeypatch):
    """Whatever is loaded, kept or written, by row: an offset in 32 bits would wrap around."""
    p = problem("capped")
    rows, cols = row_values(p, *cotangents("general", p.T)), slice(20, 70)
    near = everything(p, rows, cols)
    for name, build in dict(kept=kept, tiles=tiles, dz_room=dz_room).items():
        monkeypatch.setattr(launches, name, lambda *args, build=build: far_apart(build(*args)))
    monkeypatch.setattr(launches, "strided", far_apart)
    far = everything(p, rows, cols)
    assert all(torch.equal(x.nan_to_num(9.0), y.nan_to_num(9.0)) for x, y in zip(near, far, strict=True))
    assert all(x.stride(-2) * (p.T - 1) >= 2**31 for x in far[2:])
