"""Loads of matrix blocks and the product that makes a tile of logits."""

import triton
import triton.language as tl

# Follow from the number of rows or of parts, so from one batch to the next: no binary of their own where one of them
# is 1 or a multiple of 16, which would be compiled, and be in need of its self-check, in the middle of a run.
VARYING = (
    "T", "V", "last_col", "parts", "part", "staged_parts", "plane", "stride_rows", "stride_out", "stride_weights",
)  # fmt: skip


@triton.jit
def load_block(x, row, col, rows, cols, stride, R: tl.constexpr, C: tl.constexpr, TMA: tl.constexpr):
    """``x[row : row + R, col : col + C]``, zero outside; x is a host tensor descriptor if TMA, else a pointer."""
    if TMA:
        block = x.load([row, col])
    else:
        r, c = row + tl.arange(0, R), col + tl.arange(0, C)
        inside = (r < rows)[:, None] & (c < cols)[None, :]
        block = tl.load(x + r[:, None].to(tl.int64) * stride + c[None, :], mask=inside, other=0.0)
    return block


@triton.jit
def logits(
    h, w, row, col, T, V, D, stride_h, stride_w,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``h[rows] @ w[cols]^T``, fp32."""
    acc = tl.zeros((R, C), tl.float32)
    for k in range(0, D, K):
        a = load_block(h, row, k, T, D, stride_h, R, K, TMA)
        b = load_block(w, col, k, V, D, stride_w, C, K, TMA)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def two_logits(
    h, g, w, row, col, T, V, D, stride_h, stride_g, stride_w,
    R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``h[rows] @ w[cols]^T`` and ``g[rows] @ w[cols]^T``: one load of w for two heads that are the same tensor."""
    z = tl.zeros((R, C), tl.float32)
    r = tl.zeros((R, C), tl.float32)
    for k in range(0, D, K):
        b = load_block(w, col, k, V, D, stride_w, C, K, TMA).T
        z = tl.dot(load_block(h, row, k, T, D, stride_h, R, K, TMA), b, z, input_precision=PRECISION)
        r = tl.dot(load_block(g, row, k, T, D, stride_g, R, K, TMA), b, r, input_precision=PRECISION)
    return z, r


@triton.jit
def load_bias(bias, col, V, C: tl.constexpr, HAS_BIAS: tl.constexpr):
    """``(C,)`` fp32; zeros, which the compiler drops, where there is none."""
    c = col + tl.arange(0, C)
    if HAS_BIAS:
        values = tl.load(bias + c, mask=c < V, other=0.0).to(tl.float32)
    else:
        values = tl.zeros((C,), tl.float32)
    return values
