"""Backward: eq. (6) for a tile, from recomputed logits (`fused`) or from what was staged, in the dtype of its products.

``row_values`` are `merge_states`'s; ``coefficients`` is ``(3, stride)``: a = -g_kl and b = -g_logp, times whatever
scales dz, and dz at the label. Both have the same stride.
"""

import triton
import triton.language as tl

from .math import dz_from_both, dz_from_stage, head, softcap_slope, softmax
from .merge import load_rows
from .tile import VARYING, load_bias, logits


@triton.jit(do_not_specialize=VARYING)
def fused_dz(
    h, w, bias, g, u, ref_bias, labels, row_values, coefficients, dz,
    T, V, D, E, first_col, last_col, stride_h, stride_w, stride_g, stride_u, stride_rows, stride_dz,
    scale, softcap, ref_scale, ref_softcap,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_REF_BIAS: tl.constexpr, HAS_REF_SOFTCAP: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """dz ``(T, stride_dz)`` of columns [first_col, last_col), tiles taken as by `stats.fused_stats`."""
    if PERSISTENT:
        row_blocks = tl.cdiv(T, R)
        tiles = row_blocks * tl.cdiv(last_col - first_col, C)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1, disable_licm=True):
            dz_tile(
                h, w, bias, g, u, ref_bias, labels, row_values, coefficients, dz,
                tile % row_blocks * R, first_col + tile // row_blocks * C,
                T, V, D, E, first_col, last_col, stride_h, stride_w, stride_g, stride_u, stride_rows, stride_dz,
                scale, softcap, ref_scale, ref_softcap, R, C, K, TMA, PRECISION,
                HAS_BIAS, HAS_SOFTCAP, HAS_REF_BIAS, HAS_REF_SOFTCAP,
            )  # fmt: skip
    else:
        dz_tile(
            h, w, bias, g, u, ref_bias, labels, row_values, coefficients, dz,
            tl.program_id(0) * R, first_col + tl.program_id(1) * C,
            T, V, D, E, first_col, last_col, stride_h, stride_w, stride_g, stride_u, stride_rows, stride_dz,
            scale, softcap, ref_scale, ref_softcap, R, C, K, TMA, PRECISION,
            HAS_BIAS, HAS_SOFTCAP, HAS_REF_BIAS, HAS_REF_SOFTCAP,
        )  # fmt: skip


@triton.jit
def dz_tile(
    h, w, bias, g, u, ref_bias, labels, row_values, coefficients, dz, row, col,
    T, V, D, E, first_col, last_col, stride_h, stride_w, stride_g, stride_u, stride_rows, stride_dz,
    scale, softcap, ref_scale, ref_softcap,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_REF_BIAS: tl.constexpr, HAS_REF_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Looks at the coefficients of its rows and skips the product that they leave no use for."""
    rows = row + tl.arange(0, R)
    a, b = load_coefficients(coefficients, rows, T, stride_rows)
    needs_r = tl.sum((a != 0).to(tl.int32), 0) > 0  # true for nan
    needs_z = tl.sum((a - b != 0).to(tl.int32), 0) > 0
    if HAS_SOFTCAP:  # its slope needs z whatever else is spared
        needs_z = needs_z | needs_r
    z = tl.zeros((R, C), tl.float32)
    r = tl.zeros((R, C), tl.float32)
    if needs_z:
        z = logits(h, w, row, col, T, V, D, stride_h, stride_w, R, C, K, TMA, PRECISION)
    if needs_r:
        r = logits(g, u, row, col, T, V, E, stride_g, stride_u, R, C, K, TMA, PRECISION)
    z = head(z, load_bias(bias, col, V, C, HAS_BIAS), scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    ref_bias_C = load_bias(ref_bias, col, V, C, HAS_REF_BIAS)
    r = head(r, ref_bias_C, ref_scale, ref_softcap, HAS_REF_BIAS, HAS_REF_SOFTCAP)
    m_z, m_r, lse_z, lse_r, lse_diff = load_rows(row_values, rows, T, stride_rows)
    if needs_z & needs_r:
        out = dz_from_both(z, r, m_z, m_r, lse_z, lse_r, lse_diff, a, b)
    elif needs_r:
        out = b[:, None] * softmax(r, m_r, lse_r)
    elif needs_z:
        out = b[:, None] * softmax(z, m_z, lse_z)
    else:  # 0 x e^-lse may be 0 x inf
        out = tl.zeros((R, C), tl.float32)
    out = with_label(out, labels, coefficients + 2 * stride_rows, rows, T, col, C)
    if HAS_SOFTCAP:
        out *= softcap_slope(z, softcap)
    store_dz(dz, out, rows, T, col - first_col, last_col - first_col, stride_dz, C)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=["weights"])  # a multiple of 12 T bytes in
def staged_dz(
    staged, weights, labels, coefficients, dz,
    T, first_col, last_col, stride_p, plane, stride_rows, stride_dz, part,
    R: tl.constexpr, C: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The same from the planes that `stats.stage` filled from first_col on, in parts of `part` columns with their
    `weights` ``(parts, 3, stride_rows)``. A program takes C columns of one part."""
    col = tl.program_id(1) * C
    rows = tl.program_id(0) * R + tl.arange(0, R)
    inside = rows < T
    weights += (col // part).to(tl.int64) * 3 * stride_rows
    weight = tl.load(weights + rows, mask=inside, other=0.0)
    ref_weight = tl.load(weights + stride_rows + rows, mask=inside, other=0.0)
    ratio = tl.load(weights + 2 * stride_rows + rows, mask=inside, other=0.0)
    a, b = load_coefficients(coefficients, rows, T, stride_rows)
    cols = col + tl.arange(0, C)
    at = rows[:, None].to(tl.int64) * stride_p + cols[None, :]
    mask = inside[:, None] & (cols < last_col - first_col)[None, :]
    p = tl.load(staged + at, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(staged + plane + at, mask=mask, other=0.0).to(tl.float32)
    out = dz_from_stage(p, t, weight, ref_weight, ratio, a, b)
    out = with_label(out, labels, coefficients + 2 * stride_rows, rows, T, first_col + col, C)
    if HAS_SOFTCAP:
        out *= tl.load(staged + 2 * plane + at, mask=mask, other=0.0).to(tl.float32)
    store_dz(dz, out, rows, T, col, last_col - first_col, stride_dz, C)


@triton.jit
def load_coefficients(coefficients, rows, T, stride):
    a = tl.load(coefficients + rows, mask=rows < T, other=0.0)
    b = tl.load(coefficients + stride + rows, mask=rows < T, other=0.0)
    return a, b


@triton.jit
def with_label(out, labels, label_dz, rows, T, col, C: tl.constexpr):
    """The label's entry is not computed like the others: 1 - p_y is -expm1(logp)."""
    at = tl.load(labels + rows, mask=rows < T, other=-1) - col
    value = tl.load(label_dz + rows, mask=rows < T, other=0.0)
    return tl.where(tl.arange(0, C)[None, :] == at[:, None], value[:, None], out)


@triton.jit
def store_dz(dz, out, rows, T, col, cols_total, stride_dz, C: tl.constexpr):
    cols = col + tl.arange(0, C)
    inside = (rows < T)[:, None] & (cols < cols_total)[None, :]
    tl.store(dz + rows[:, None].to(tl.int64) * stride_dz + cols[None, :], out.to(dz.dtype.element_ty), mask=inside)
