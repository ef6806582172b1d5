"""Backward: dz of a tile, eq. (9), from products made again; in the dtype in which it is multiplied.

`row_values` are ``(9, stride_rows)``: top_z, top_r, lse_z, lse_r, gap of the whole row, a, b, c, and dz at the label.
"""

import triton
import triton.language as tl

from .math import dz_of_both, dz_of_one, softcap_slope
from .tile import ROWS, VARYING, product, store_tile, through_head


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=ROWS)
def fused_dz(
    h, w, g, u, strides, head, ref_head, labels, row_values, dz,
    T, V, D, E, col, stride_rows, stride_dz,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fill dz ``(T, V)``; operands as in `stats.fused_stats`, u included."""
    row, first = tl.program_id(0) * R, tl.program_id(1) * C
    rows = row + tl.arange(0, R)
    needs_z, needs_r = needed(row_values, rows, T, stride_rows, head.softcap)
    z = tl.zeros((R, C), tl.float32)
    r = tl.zeros((R, C), tl.float32)
    if needs_z:
        z = product(h, w, row, first, T, V, D, strides.h, strides.w, R, C, K, PRECISION)
    if needs_r:
        r = product(g, u, row, first, T, V, E, strides.g, strides.u, R, C, K, PRECISION)
    finish(
        dz, z, r, needs_z, needs_r, head, ref_head, labels, row_values, rows, first, T, V, col, stride_rows, stride_dz,
        C,
    )  # fmt: skip


@triton.jit
def needed(row_values, rows, T, stride_rows, softcap):
    """Return whether a and c of these rows leave a use for the policy's and for the reference's products."""
    a, c = load_row(row_values, 5, rows, T, stride_rows), load_row(row_values, 7, rows, T, stride_rows)
    needs_r = tl.sum((a != 0).to(tl.int32), 0) > 0  # true for nan
    needs_z = tl.sum((c != 0).to(tl.int32), 0) > 0
    if softcap is not None:  # its slope needs z whatever else is spared
        label_dz = load_row(row_values, 8, rows, T, stride_rows)
        needs_z = needs_z | needs_r | (tl.sum((label_dz != 0).to(tl.int32), 0) > 0)
    return needs_z, needs_r


@triton.jit
def load_row(row_values, i: tl.constexpr, rows, T, stride):
    return tl.load(row_values + i * stride + rows, mask=rows < T, other=0.0)


@triton.jit
def finish(
    dz, z, r, needs_z, needs_r, head, ref_head, labels, row_values, rows, first, T, V, col, stride_rows, stride_dz,
    C: tl.constexpr,
):  # fmt: skip
    """Store dz from the products that are needed. The label's entry is not computed like the others."""
    x, z = through_head(z, head, first, V, C)
    _, r = through_head(r, ref_head, first, V, C)
    top_z, top_r = load_row(row_values, 0, rows, T, stride_rows), load_row(row_values, 1, rows, T, stride_rows)
    lse_z, lse_r = load_row(row_values, 2, rows, T, stride_rows), load_row(row_values, 3, rows, T, stride_rows)
    gap, a = load_row(row_values, 4, rows, T, stride_rows), load_row(row_values, 5, rows, T, stride_rows)
    b, c = load_row(row_values, 6, rows, T, stride_rows), load_row(row_values, 7, rows, T, stride_rows)
    if needs_z & needs_r:
        out = dz_of_both(z, r, top_z, top_r, lse_z, lse_r, gap, a, b, c)
    elif needs_r:
        out = dz_of_one(r, top_r, lse_r, b)
    elif needs_z:
        out = dz_of_one(z, top_z, lse_z, b)
    else:  # 0 x e^-lse may be 0 x inf
        out = tl.zeros((rows.shape[0], C), tl.float32)
    label = tl.load(labels + rows, mask=rows < T, other=-1) - col
    label_dz = load_row(row_values, 8, rows, T, stride_rows)
    is_label = (first + tl.arange(0, C))[None, :] == label[:, None]
    out = tl.where(is_label, label_dz[:, None], out)
    if head.softcap is not None:
        out *= softcap_slope(x, head.softcap)
    store_tile(dz, out, rows, first, T, V, stride_dz, C)
