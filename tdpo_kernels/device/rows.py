"""Forward and backward of one tile whose products lie in memory, fp32 and `stride` elements a row: what a library
multiplied, or what `stats.fused_stats` kept. A program takes whole rows of the tile, all C columns of it."""

import triton
import triton.language as tl

from .dlogits import finish, needed
from .stats import reduce
from .tile import ROWS, VARYING, load_tile, through_head


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=ROWS)
def tile_stats(
    z_tile, r_tile, head, ref_head, labels, states, label_logits, T, V, col, stride, stride_labels,
    R: tl.constexpr, C: tl.constexpr, EXTRAS: tl.constexpr,
):  # fmt: skip
    """Fill the state ``(STATE, T)`` of all V columns, one part, and their labels' logits."""
    rows = tl.program_id(0) * R + tl.arange(0, R)
    _, z = through_head(load_tile(z_tile, rows, 0, T, V, stride, C), head, 0, V, C)
    _, r = through_head(load_tile(r_tile, rows, 0, T, V, stride, C), ref_head, 0, V, C)
    reduce(z, r, labels, states, label_logits, rows, 0, T, V, col, stride_labels, C, EXTRAS)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=ROWS)
def tile_dz(
    z_tile, r_tile, head, ref_head, labels, row_values, dz, T, V, col, stride, stride_rows, stride_dz,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Fill dz ``(T, V)``. A tile that none of a program's rows needs is not read."""
    rows = tl.program_id(0) * R + tl.arange(0, R)
    needs_z, needs_r = needed(row_values, rows, T, stride_rows, head.softcap)
    z = tl.zeros((R, C), tl.float32)
    r = tl.zeros((R, C), tl.float32)
    if needs_z:
        z = load_tile(z_tile, rows, 0, T, V, stride, C)
    if needs_r:
        r = load_tile(r_tile, rows, 0, T, V, stride, C)
    finish(
        dz, z, r, needs_z, needs_r, head, ref_head, labels, row_values, rows, 0, T, V, col, stride_rows, stride_dz, C
    )  # fmt: skip
