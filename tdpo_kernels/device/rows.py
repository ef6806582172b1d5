"""`tiled` on a GPU: both models' tiles ``(R, stride)`` lie in cache, made by library products; one pass each over them.

A program takes R whole rows of the tile, all C columns of it.
"""

import triton
import triton.language as tl

from .dlogits import load_coefficients, store_dz, with_label
from .math import dz_from_both, head, softcap_slope, softmax
from .merge import load_rows
from .stats import tile_forward
from .tile import VARYING, load_bias


@triton.jit
def load_tile(x, bias, rows, T, col, cols, V, stride, scale, softcap, C: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):  # fmt: skip # noqa: E501
    """Logits of `rows`, through the head; 0 products past the tile's columns."""
    inside = (rows < T)[:, None] & (tl.arange(0, C) < cols)[None, :]
    out = tl.load(x + rows[:, None].to(tl.int64) * stride + tl.arange(0, C)[None, :], mask=inside, other=0.0)
    return head(out, load_bias(bias, col, V, C, HAS_BIAS), scale, softcap, HAS_BIAS, HAS_SOFTCAP)


@triton.jit(do_not_specialize=VARYING)
def tile_stats(
    z_tile, bias, r_tile, ref_bias, labels, states, staged,
    T, V, first_col, last_col, stride, stride_p, plane, scale, softcap, ref_scale, ref_softcap, F,
    R: tl.constexpr, C: tl.constexpr, STAGE: tl.constexpr, EXTRAS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_REF_BIAS: tl.constexpr, HAS_REF_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The state ``(STATE, T)`` of columns [first_col, last_col), one part, and what is staged of it."""
    rows, cols = tl.program_id(0) * R + tl.arange(0, R), last_col - first_col
    z = load_tile(z_tile, bias, rows, T, first_col, cols, V, stride, scale, softcap, C, HAS_BIAS, HAS_SOFTCAP)
    r = load_tile(
        r_tile, ref_bias, rows, T, first_col, cols, V, stride, ref_scale, ref_softcap, C, HAS_REF_BIAS, HAS_REF_SOFTCAP
    )
    label = tl.load(labels + rows, mask=rows < T, other=-1) - first_col
    tile_forward(
        z, r, states, staged, rows, T, label, 0, cols, stride_p, plane, softcap, F, C, STAGE, EXTRAS, HAS_SOFTCAP
    )


@triton.jit(do_not_specialize=VARYING)
def tile_dz(
    z_tile, bias, r_tile, ref_bias, labels, row_values, coefficients, dz,
    T, V, first_col, last_col, stride, stride_rows, stride_dz, scale, softcap, ref_scale, ref_softcap,
    R: tl.constexpr, C: tl.constexpr, NEEDS_Z: tl.constexpr, NEEDS_R: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_REF_BIAS: tl.constexpr, HAS_REF_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dz ``(T, stride_dz)`` of columns [first_col, last_col), from the tiles that the host found to be needed."""
    rows, cols = tl.program_id(0) * R + tl.arange(0, R), last_col - first_col
    a, b = load_coefficients(coefficients, rows, T, stride_rows)
    m_z, m_r, lse_z, lse_r, lse_diff = load_rows(row_values, rows, T, stride_rows)
    if NEEDS_Z:
        z = load_tile(z_tile, bias, rows, T, first_col, cols, V, stride, scale, softcap, C, HAS_BIAS, HAS_SOFTCAP)
    if NEEDS_R:
        r = load_tile(
            r_tile, ref_bias, rows, T, first_col, cols, V, stride, ref_scale, ref_softcap, C,
            HAS_REF_BIAS, HAS_REF_SOFTCAP,
        )  # fmt: skip
    if NEEDS_Z and NEEDS_R:
        out = dz_from_both(z, r, m_z, m_r, lse_z, lse_r, lse_diff, a, b)
    elif NEEDS_Z:
        out = b[:, None] * softmax(z, m_z, lse_z)
    else:
        out = b[:, None] * softmax(r, m_r, lse_r)
    out = with_label(out, labels, coefficients + 2 * stride_rows, rows, T, first_col, C)
    if HAS_SOFTCAP:
        out *= softcap_slope(z, softcap)
    store_dz(dz, out, rows, T, 0, cols, stride_dz, C)
