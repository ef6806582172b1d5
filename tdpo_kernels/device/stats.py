"""Forward of a tile of logits, whoever made it: its state without the labels, its labels' logits; and the kernel of
`fused`, which makes both models' tiles in registers.

States are ``(parts, STATE, T)``: the four of `math.sums`, the two of `math.kl_and_gap`, and with EXTRAS those of
`math.extras`.
"""

import triton
import triton.language as tl

from .math import LOWEST, extras, kl_and_gap, sums
from .tile import ROWS, VARYING, product, store_tile, through_head, two_products


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=ROWS)
def fused_stats(
    h, w, g, u, strides, head, ref_head, labels, states, label_logits, kept,
    T, V, D, E, col, stride_labels, stride_kept, plane,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, EXTRAS: tl.constexpr,
):  # fmt: skip
    """Fill the states of ``h w^T`` and ``g u^T``: ``h (T, D)``, ``w (V, D)``, ``g (T, E)``, ``u (V, E)``.

    A program takes R rows of a part of C columns; rows vary fastest, so that tiles in the making share their columns.
    u is None where both heads are one tensor. `strides` are those of h, w, g and u, None where these are descriptors.
    `kept` is filled with both products, `plane` elements apart, unless that is 0. Labels count from column `col` before
    the first one here.
    """
    row, first = tl.program_id(0) * R, tl.program_id(1) * C
    if u is None:
        z, r = two_products(h, g, w, row, first, T, V, D, strides.h, strides.g, strides.w, R, C, K, PRECISION)
    else:
        z = product(h, w, row, first, T, V, D, strides.h, strides.w, R, C, K, PRECISION)
        r = product(g, u, row, first, T, V, E, strides.g, strides.u, R, C, K, PRECISION)
    rows = row + tl.arange(0, R)
    if plane > 0:
        store_tile(kept, z, rows, first, T, V, stride_kept, C)
        store_tile(kept + plane, r, rows, first, T, V, stride_kept, C)
    _, z = through_head(z, head, first, V, C)
    _, r = through_head(r, ref_head, first, V, C)
    states += tl.program_id(1).to(tl.int64) * (6 + 2 * EXTRAS) * T
    reduce(z, r, labels, states, label_logits, rows, first, T, V, col, stride_labels, C, EXTRAS)


@triton.jit
def reduce(z, r, labels, state, label_logits, rows, first, T, V, col, stride_labels, C: tl.constexpr, EXTRAS: tl.constexpr):  # fmt: skip # noqa: E501
    """Store the state ``(STATE, T)`` of a tile at column `first` of V, and its labels' logits."""
    inside = rows < T
    label = tl.load(labels + rows, mask=inside, other=-1) - col
    has_label = inside & (label >= first) & (label < tl.minimum(first + C, V))
    cols = first + tl.arange(0, C)
    is_label = cols[None, :] == label[:, None]
    if tl.max(has_label.to(tl.int32), 0) > 0:  # most tiles have none at all
        tl.store(label_logits + rows, tl.sum(tl.where(is_label, z, 0.0), 1), mask=has_label)
        tl.store(label_logits + stride_labels + rows, tl.sum(tl.where(is_label, r, 0.0), 1), mask=has_label)
    counts = (cols < V)[None, :] & (is_label == 0)
    z, r = tl.where(counts, z, LOWEST), tl.where(counts, r, LOWEST)
    top_z, top_r, lse_z, lse_r = sums(z, r)
    store(state, 0, top_z, rows, T)
    store(state, 1, top_r, rows, T)
    store(state, 2, lse_z, rows, T)
    store(state, 3, lse_r, rows, T)
    if T > 0:  # it is; but no compiler begins the next pass over the tiles within this one, for want of registers
        if EXTRAS:
            entropy, total = extras(z, top_z, lse_z, counts)
            store(state, 6, entropy, rows, T)
            store(state, 7, total, rows, T)
    if T > 0:
        kl, gap = kl_and_gap(z, r, top_z, top_r, lse_z, lse_r)
        store(state, 4, kl, rows, T)
        store(state, 5, gap, rows, T)


@triton.jit
def store(state, i: tl.constexpr, x, rows, T):
    tl.store(state + i * T + rows, x, mask=rows < T)
