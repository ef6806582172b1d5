"""The states of all parts of the vocabulary into the statistics of each row; and what backward wants of staged tiles.

Row values are ``(ROWS, stride)``: m_z, m_r, lse_z, lse_r, lse_diff (`math.py`), kl, logp, ref_logp, label_ratio: what
delta' is at the label; and the extras: entropy, the sum of the logits, is_argmax.
"""

import triton
import triton.language as tl

from .math import above, anchored, empty_state, finish, kl_of, lse_diff_of, merge, merged_extras, part_weights, raised
from .stats import STATE, load_state
from .tile import VARYING

ROWS = tl.constexpr(12)
GROUP = tl.constexpr(32)


@triton.jit(do_not_specialize=VARYING)
def merge_states(
    states, out, weights, T, parts, staged_parts, stride_out, stride_weights, R: tl.constexpr, EXTRAS: tl.constexpr
):
    """`states` ``(parts, STATE, T)`` to `out` ``(ROWS, stride_out)``: groups of GROUP parts in order, then the groups:
    the same bits every time, and rounding that grows with the square root of what one long chain would have.

    Of the first `staged_parts` `math.part_weights` go to `weights` ``(staged_parts, 3, stride_weights)``.
    """
    rows = tl.program_id(0) * R + tl.arange(0, R)
    inside = rows < T
    m_z, s_z, m_r, s_r, mean, M = empty_state(rows.to(tl.float32))
    z_y = tl.zeros((R,), tl.float32)
    r_y = tl.zeros((R,), tl.float32)
    total = tl.zeros((R,), tl.float32)
    weighted = tl.zeros((R,), tl.float32)
    part = states
    for first in range(0, parts, GROUP):
        n_z, t_z, n_r, t_r, other_mean, N = empty_state(rows.to(tl.float32))
        group_total = tl.zeros((R,), tl.float32)
        group_weighted = tl.zeros((R,), tl.float32)
        for _ in range(first, tl.minimum(first + GROUP, parts)):
            p_z, u_z, p_r, u_r, part_mean, P, z_label, r_label = load_state(part, rows, T)
            if EXTRAS:
                group_total += tl.load(part + 8 * T + rows, mask=inside, other=0.0)
                part_weighted = tl.load(part + 9 * T + rows, mask=inside, other=0.0)
                group_weighted = merged_extras(n_z, t_z, group_weighted, p_z, u_z, part_weighted)
            n_z, t_z, n_r, t_r, other_mean, N = merge(
                n_z, t_z, n_r, t_r, other_mean, N, p_z, u_z, p_r, u_r, part_mean, P
            )
            z_y += z_label
            r_y += r_label
            part += STATE * T
        if EXTRAS:
            total += group_total
            weighted = merged_extras(m_z, s_z, weighted, n_z, t_z, group_weighted)
        m_z, s_z, m_r, s_r, mean, M = merge(m_z, s_z, m_r, s_r, mean, M, n_z, t_z, n_r, t_r, other_mean, N)
    lse_z, lse_r, phi = finish(s_z, s_r, M)
    kl = kl_of(lse_z, lse_r, mean, phi)
    lse_diff = lse_diff_of(lse_z, lse_r, mean, phi)
    y_z, y_r, left_z, left_r = anchored(z_y[:, None], r_y[:, None], m_z, m_r)
    above_y = tl.sum(above(y_z, y_r, left_z, left_r), 1)
    tl.store(out + rows, m_z, mask=inside)
    tl.store(out + stride_out + rows, m_r, mask=inside)
    tl.store(out + 2 * stride_out + rows, lse_z, mask=inside)
    tl.store(out + 3 * stride_out + rows, lse_r, mask=inside)
    tl.store(out + 4 * stride_out + rows, lse_diff, mask=inside)
    tl.store(out + 5 * stride_out + rows, kl, mask=inside)
    tl.store(out + 6 * stride_out + rows, (z_y - m_z) - lse_z, mask=inside)
    tl.store(out + 7 * stride_out + rows, (r_y - m_r) - lse_r, mask=inside)
    tl.store(out + 8 * stride_out + rows, lse_diff - above_y, mask=inside)
    if EXTRAS:
        tl.store(out + 9 * stride_out + rows, lse_z - weighted / s_z, mask=inside)
        tl.store(out + 10 * stride_out + rows, total, mask=inside)
        tl.store(out + 11 * stride_out + rows, (z_y >= m_z).to(tl.float32), mask=inside)
    part = states
    for _ in range(staged_parts):
        n_z, t_z, n_r, t_r, other_mean, N, _, _ = load_state(part, rows, T)
        tile_z, tile_r, tile_phi = finish(t_z, t_r, N)
        tile_diff = lse_diff_of(tile_z, tile_r, other_mean, tile_phi) + raised(n_z, n_r, m_z, m_r) - lse_diff
        up_z, up_r = (n_z - m_z) + tile_z - lse_z, (n_r - m_r) + tile_r - lse_r
        weight, ref_weight, ratio = part_weights(up_z, up_r, tile_diff)
        factor = tl.load(part + 10 * T + rows, mask=inside, other=1.0)
        more = tl.load(part + 11 * T + rows, mask=inside, other=0.0)
        tl.store(weights + rows, weight * factor, mask=inside)
        tl.store(weights + stride_weights + rows, ref_weight * factor, mask=inside)
        tl.store(weights + 2 * stride_weights + rows, ratio + more, mask=inside)
        part += STATE * T
        weights += 3 * stride_weights


@triton.jit
def load_rows(values, rows, T, stride):
    """What the backward of a row needs: m_z, m_r, lse_z, lse_r, lse_diff."""
    inside = rows < T
    m_z = tl.load(values + rows, mask=inside, other=0.0)
    m_r = tl.load(values + stride + rows, mask=inside, other=0.0)
    lse_z = tl.load(values + 2 * stride + rows, mask=inside, other=0.0)
    lse_r = tl.load(values + 3 * stride + rows, mask=inside, other=0.0)
    lse_diff = tl.load(values + 4 * stride + rows, mask=inside, other=0.0)
    return m_z, m_r, lse_z, lse_r, lse_diff
