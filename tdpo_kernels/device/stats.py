"""Forward of one tile of logits, whoever made it: its state, its labels' logits, and what is staged of it; and the
kernel of `fused`, which makes both models' tiles in registers.

States are ``(part, STATE, T)``, STATE being m_z, s_z, m_r, s_r, mean, M (`math.py`), the label's two logits, the two
sums that extras are made of, and for a staged part the two numbers that make up for rounding (`math.made_up`).
What is staged are planes ``(R, stride_p)`` of p, of t, and with a softcap of its slope, `plane` elements apart.
"""

import triton
import triton.language as tl

from .math import (
    LOWEST,
    anchored,
    head,
    log_ratio,
    lse_diff_of,
    made_up,
    softcap_slope,
    tile_extras,
    tile_state,
    weigh,
)
from .tile import VARYING, load_bias, logits, two_logits

STATE = tl.constexpr(12)


@triton.jit(do_not_specialize=VARYING)
def fused_stats(
    h, w, bias, g, u, ref_bias, labels, states, staged,
    T, V, D, E, first_col, last_col, stride_h, stride_w, stride_g, stride_u, stride_p, plane,
    scale, softcap, ref_scale, ref_softcap, F,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ONE_HEAD: tl.constexpr, STAGE: tl.constexpr,
    EXTRAS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_REF_BIAS: tl.constexpr, HAS_REF_SOFTCAP: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """States ``(parts, STATE, T)`` of columns [first_col, last_col) of ``h w^T`` and ``g u^T``: ``h (T, D)``, ``w (V,
    D)``, ``g (T, E)``, ``u (V, E)``, biases ``(V,)`` or None. With STAGE `staged` is filled from first_col on.

    A tile is R rows of a part of C columns, staged or not, so that what is staged changes no bit of the statistics.
    Each has a program, or with PERSISTENT the programs that there are take turns; rows vary fastest, so that tiles in
    the making share their columns.
    """
    if PERSISTENT:
        row_blocks = tl.cdiv(T, R)
        tiles = row_blocks * tl.cdiv(last_col - first_col, C)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1, disable_licm=True):
            stats_tile(
                h, w, bias, g, u, ref_bias, labels, states, staged, tile % row_blocks * R, tile // row_blocks,
                T, V, D, E, first_col, last_col, stride_h, stride_w, stride_g, stride_u, stride_p, plane,
                scale, softcap, ref_scale, ref_softcap, F, R, C, K, TMA, PRECISION, ONE_HEAD, STAGE, EXTRAS,
                HAS_BIAS, HAS_SOFTCAP, HAS_REF_BIAS, HAS_REF_SOFTCAP,
            )  # fmt: skip
    else:
        stats_tile(
            h, w, bias, g, u, ref_bias, labels, states, staged, tl.program_id(0) * R, tl.program_id(1),
            T, V, D, E, first_col, last_col, stride_h, stride_w, stride_g, stride_u, stride_p, plane,
            scale, softcap, ref_scale, ref_softcap, F, R, C, K, TMA, PRECISION, ONE_HEAD, STAGE, EXTRAS,
            HAS_BIAS, HAS_SOFTCAP, HAS_REF_BIAS, HAS_REF_SOFTCAP,
        )  # fmt: skip


@triton.jit
def stats_tile(
    h, w, bias, g, u, ref_bias, labels, states, staged, row, part,
    T, V, D, E, first_col, last_col, stride_h, stride_w, stride_g, stride_u, stride_p, plane,
    scale, softcap, ref_scale, ref_softcap, F,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, ONE_HEAD: tl.constexpr, STAGE: tl.constexpr,
    EXTRAS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_REF_BIAS: tl.constexpr, HAS_REF_SOFTCAP: tl.constexpr,
):  # fmt: skip
    rows, col = row + tl.arange(0, R), first_col + part * C
    label = tl.load(labels + rows, mask=rows < T, other=-1) - col
    if ONE_HEAD:
        z, r = two_logits(h, g, w, row, col, T, V, D, stride_h, stride_g, stride_w, R, C, K, TMA, PRECISION)
    else:
        z = logits(h, w, row, col, T, V, D, stride_h, stride_w, R, C, K, TMA, PRECISION)
        r = logits(g, u, row, col, T, V, E, stride_g, stride_u, R, C, K, TMA, PRECISION)
    z = head(z, load_bias(bias, col, V, C, HAS_BIAS), scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    ref_bias_C = load_bias(ref_bias, col, V, C, HAS_REF_BIAS)
    r = head(r, ref_bias_C, ref_scale, ref_softcap, HAS_REF_BIAS, HAS_REF_SOFTCAP)
    tile_forward(
        z, r, states + part * STATE * T, staged, rows, T, label, col - first_col, last_col - first_col,
        stride_p, plane, softcap, F, C, STAGE, EXTRAS, HAS_SOFTCAP,
    )  # fmt: skip


@triton.jit
def tile_forward(
    z, r, part, staged, rows, T, label, col, cols, stride_p, plane, softcap, F,
    C: tl.constexpr, STAGE: tl.constexpr, EXTRAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """All that a tile of both models' logits, at column `col` of `cols`, leaves behind; labels count from there."""
    z_y, r_y = pick(z, r, tl.where(label < cols - col, label, -1), C)
    z, r = within(z, cols - col, C), within(r, cols - col, C)
    m_z, m_r = tl.max(z, 1), tl.max(r, 1)
    if EXTRAS:
        total, weighted = tile_extras(z, m_z, tl.arange(0, C) < cols - col)
        tl.store(part + 8 * T + rows, total, mask=rows < T)
        tl.store(part + 9 * T + rows, weighted, mask=rows < T)
    if STAGE and HAS_SOFTCAP:
        store_plane(staged + 2 * plane, softcap_slope(z, softcap), rows, T, col, cols, stride_p, C)
    z, r, left_z, left_r = anchored(z, r, m_z, m_r)
    s_z, s_r, mean, M = tile_state(z, r, left_z, left_r)
    store_state(part, rows, T, m_z, s_z, m_r, s_r, mean, M, z_y, r_y)
    if STAGE:
        stage(staged, part, rows, T, stride_p, plane, col, cols, label, z, r, left_z, s_z, left_r, s_r, mean, M, F, C)


@triton.jit
def pick(z, r, at, C: tl.constexpr):
    """Both logits of each row in column `at`; 0 where that is outside. Most tiles hold no label at all."""
    z_y = at.to(tl.float32) * 0.0
    r_y = z_y
    if tl.max(((at >= 0) & (at < C)).to(tl.int32), 0) > 0:
        z_y = tl.sum(tl.where(tl.arange(0, C)[None, :] == at[:, None], z, 0.0), 1)
        r_y = tl.sum(tl.where(tl.arange(0, C)[None, :] == at[:, None], r, 0.0), 1)
    return z_y, r_y


@triton.jit
def within(x, count, C: tl.constexpr):
    """Columns from `count` on are ruled out."""
    return tl.where((tl.arange(0, C) < count)[None, :], x, LOWEST)


@triton.jit
def stage(out, part, rows, T, stride, plane, col, cols, label, z, r, m_z, s_z, m_r, s_r, mean, M, F, C: tl.constexpr):
    """p within the tile and t = log(p / q), such that p e^-t is q though t is rounded, into planes at column `col` of
    `cols`; into the part's state what makes up for the rounding of both in the row's sums, but for the label's entry,
    which backward has in full. z, r, m_z and m_r are what `anchored` returned."""
    dtype = out.dtype.element_ty
    exact_t = log_ratio(z, r, m_z, m_r, lse_diff_of(tl.log(s_z), tl.log(s_r), mean, M / s_r), F)
    t = exact_t.to(dtype)
    store_plane(out + plane, t, rows, T, col, cols, stride, C)
    p, q = tl.exp(z - m_z[:, None]) / s_z[:, None], tl.exp(r - m_r[:, None]) / s_r[:, None]
    kept_p = weigh(p, q, t.to(tl.float32)).to(dtype)
    store_plane(out, kept_p, rows, T, col, cols, stride, C)
    if dtype == tl.float32:  # nothing was rounded, and the sums' own rounding is not to be made up for
        more = tl.zeros_like(s_z)
        factor = more + 1.0
    else:
        is_label = tl.arange(0, C)[None, :] == label[:, None]
        factor, more = made_up(p, q, exact_t, kept_p.to(tl.float32), t.to(tl.float32), is_label)
    tl.store(part + 10 * T + rows, factor, mask=rows < T)
    tl.store(part + 11 * T + rows, more, mask=rows < T)


@triton.jit
def store_plane(out, x, rows, T, col, cols, stride, C: tl.constexpr):
    at = rows[:, None].to(tl.int64) * stride + (col + tl.arange(0, C))[None, :]
    tl.store(out + at, x.to(out.dtype.element_ty), mask=(rows < T)[:, None] & (col + tl.arange(0, C) < cols)[None, :])


@triton.jit
def store_state(part, rows, T, m_z, s_z, m_r, s_r, mean, M, z_y, r_y):
    inside = rows < T
    tl.store(part + rows, m_z, mask=inside)
    tl.store(part + T + rows, s_z, mask=inside)
    tl.store(part + 2 * T + rows, m_r, mask=inside)
    tl.store(part + 3 * T + rows, s_r, mask=inside)
    tl.store(part + 4 * T + rows, mean, mask=inside)
    tl.store(part + 5 * T + rows, M, mask=inside)
    tl.store(part + 6 * T + rows, z_y, mask=inside)
    tl.store(part + 7 * T + rows, r_y, mask=inside)


@triton.jit
def load_state(part, rows, T):
    inside = rows < T
    m_z = tl.load(part + rows, mask=inside, other=0.0)
    s_z = tl.load(part + T + rows, mask=inside, other=1.0)
    m_r = tl.load(part + 2 * T + rows, mask=inside, other=0.0)
    s_r = tl.load(part + 3 * T + rows, mask=inside, other=1.0)
    mean = tl.load(part + 4 * T + rows, mask=inside, other=0.0)
    M = tl.load(part + 5 * T + rows, mask=inside, other=0.0)
    z_y = tl.load(part + 6 * T + rows, mask=inside, other=0.0)
    r_y = tl.load(part + 7 * T + rows, mask=inside, other=0.0)
    return m_z, s_z, m_r, s_r, mean, M, z_y, r_y
