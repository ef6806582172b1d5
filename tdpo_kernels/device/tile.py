"""Loads of matrix blocks, the products that make a tile, and what a head makes of them.

A head is a NamedTuple of bias ``(V,)``, scale and softcap, None where there is none, which Triton compiles for.
"""

import triton
import triton.language as tl

from .math import LOWEST, RULED_OUT, tanh

# Follow from the rows and columns at hand: no binary of their own where one of them is 1 or a multiple of 16, which
# would be compiled, and be in need of its self-check, in the middle of a run.
VARYING = ("T", "V", "col", "stride_labels", "stride_rows")
ROWS = ("labels", "states", "label_logits", "row_values")  # the same goes for where a block's rows begin in these


@triton.jit
def load_block(x, row, col, rows, cols, stride, R: tl.constexpr, C: tl.constexpr):
    """Return ``x[row : row + R, col : col + C]``, zero outside; x is a host tensor descriptor if stride is None."""
    if stride is None:
        block = x.load([row, col])
    else:
        r, c = row + tl.arange(0, R), col + tl.arange(0, C)
        inside = (r < rows)[:, None] & (c < cols)[None, :]
        block = tl.load(x + r[:, None].to(tl.int64) * stride + c[None, :], mask=inside, other=0.0)
    return block


@triton.jit
def product(
    h, w, row, col, T, V, D, stride_h, stride_w,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return ``h[rows] @ w[cols]^T``, fp32."""
    acc = tl.zeros((R, C), tl.float32)
    for k in range(0, D, K):
        a = load_block(h, row, k, T, D, stride_h, R, K)
        b = load_block(w, col, k, V, D, stride_w, C, K)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def two_products(
    h, g, w, row, col, T, V, D, stride_h, stride_g, stride_w,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return ``h[rows] @ w[cols]^T`` and ``g[rows] @ w[cols]^T``: two heads of one weight load it once."""
    z = tl.zeros((R, C), tl.float32)
    r = tl.zeros((R, C), tl.float32)
    for k in range(0, D, K):
        b = load_block(w, col, k, V, D, stride_w, C, K).T
        z = tl.dot(load_block(h, row, k, T, D, stride_h, R, K), b, z, input_precision=PRECISION)
        r = tl.dot(load_block(g, row, k, T, D, stride_g, R, K), b, r, input_precision=PRECISION)
    return z, r


@triton.jit
def through_head(acc, head, col, V, C: tl.constexpr):
    """Return ``x = (acc + bias) * scale`` and the logits ``softcap * tanh(x / softcap)``, which without a softcap are
    x. Both are LOWEST in columns that the bias rules out."""
    x = acc
    if head.bias is not None:
        cols = col + tl.arange(0, C)
        bias = tl.load(head.bias + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
        x += bias
    x *= head.scale
    z = x
    if head.softcap is not None:
        z = head.softcap * tanh(x / head.softcap)
    if head.bias is not None:
        x = tl.where(bias < RULED_OUT, LOWEST, x)
        z = tl.where(bias < RULED_OUT, LOWEST, z)
    return x, z


@triton.jit
def load_tile(x, rows, col, T, V, stride, C: tl.constexpr):
    """Return columns [col, col + C) of these rows of a matrix of V columns, zero outside."""
    cols = col + tl.arange(0, C)
    inside = (rows < T)[:, None] & (cols < V)[None, :]
    return tl.load(x + rows[:, None].to(tl.int64) * stride + cols[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(out, x, rows, col, T, V, stride, C: tl.constexpr):
    """Store x where `load_tile` would load it. From the first of these rows on, 32 bits do, and spare registers."""
    cols = col + tl.arange(0, C)
    inside = (rows < T)[:, None] & (cols < V)[None, :]
    out += tl.min(rows, 0).to(tl.int64) * stride
    at = (rows - tl.min(rows, 0))[:, None] * stride + cols[None, :]
    tl.store(out + at, x.to(out.dtype.element_ty), mask=inside)
