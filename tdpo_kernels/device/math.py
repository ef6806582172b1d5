r"""Row mathematics of a tile of logits, without pointers: eqs. (8) and (9) of `reference.py`, as `backends/rowmath.py`
has them in torch.

Tiles are fp32 ``(R, C)``, row values ``(R,)``. LOWEST stands for -inf, so that inf - inf never happens: in columns
that a bias rules out, and in those that a tile leaves to others, its label's and those past its last one. An
exponential of LOWEST less a top is 0, and every weight below is one.

Registers decide how this is written: both models' tiles take half of them, so nothing of a tile's size may be kept from
one pass over them to the next.
"""

import math

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)
RULED_OUT = tl.constexpr(-1e29)  # a bias below this rules its column out
NEAR = tl.constexpr(0.35)  # e^y - 1 - y is a series below, exponentials above
FAR = tl.constexpr(8.0)  # from here on e^y is had from p itself, which cannot overflow
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def exp(x):
    """Return e^x, or 0 where that is not a normal number. `tl.exp` keeps those, at twice the instructions."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def psi_series(y):
    """Return ``e^y - 1 - y`` for |y| < NEAR, to fp32's last digit."""
    s = tl.fma(y, 1.0 / 40320, 1.0 / 5040)
    s = tl.fma(y, s, 1.0 / 720)
    s = tl.fma(y, s, 1.0 / 120)
    s = tl.fma(y, s, 1.0 / 24)
    s = tl.fma(y, s, 1.0 / 6)
    return y * y * tl.fma(y, s, 0.5)


@triton.jit
def expm1(y):
    """Return ``e^y - 1``."""
    return tl.where(tl.abs(y) < NEAR, y + psi_series(y), exp(y) - 1.0)


@triton.jit
def not_negative(x):
    """Return x, or 0 where it is negative. A nan stays one, which `tl.maximum` would drop on a device."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def exact_difference(z, r, top_z, top_r):
    """Return ``(z - top_z) - (r - top_r)`` to an eps of itself: what rounding took from z - r and from the tops'
    difference is had exactly, and put back."""
    s = z - r
    b = s - z
    lost = (z - (s - b)) - (r + b)
    top = top_z - top_r
    top_b = top - top_z
    top_lost = (top_z - (top - top_b)) - (top_r + top_b)
    return (s - top[:, None]) + (lost - top_lost[:, None])


# --- the head ---------------------------------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """Return ``expm1(2|x|) / (expm1(2|x|) + 2)`` with the sign of x."""
    e = expm1(2.0 * tl.where(tl.abs(x) > 20.0, 20.0, tl.abs(x)))
    t = e / (e + 2.0)
    return tl.where(x < 0, -t, t)


@triton.jit
def softcap_slope(x, softcap):
    """Return d (softcap tanh(x / softcap)) / dx = sech^2(x / softcap), which 1 - tanh^2 has no digits of near 1."""
    e = exp(-2.0 * tl.abs(x / softcap))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


# --- forward: eq. (8) over the columns of a tile ----------------------------------------------------------------------


@triton.jit
def sums(z, r):
    """Return the tops of a tile, and the log-sum-exps relative to them."""
    top_z, top_r = tl.max(z, 1), tl.max(r, 1)
    s_z, s_r = tl.sum(exp(z - top_z[:, None]), 1), tl.sum(exp(r - top_r[:, None]), 1)
    return top_z, top_r, tl.log(s_z), tl.log(s_r)


@triton.jit
def kl_and_gap(z, r, top_z, top_r, lse_z, lse_r):
    """Return what is left of a tile's state. A column is a part with KL 0; where gap was rounded, y is too large by e
    in all of them."""
    gap = lse_z - lse_r
    y = exact_difference(z, r, top_z, top_r) - gap[:, None]
    top_z, top_r = (
        tl.where(lse_z >= 0.0, top_z, 0.0),
        tl.where(lse_r >= 0.0, top_r, 0.0),
    )  # it is, unknown to compilers,
    q = softmax(r, top_r, lse_r)  # who would keep r - top_r and z - top_z from `sums` until here
    more, psi = gained(q, y, z, top_z, lse_z)
    e = tl.sum(more, 1)
    return not_negative(tl.sum(psi, 1) - 0.5 * e * e), gap + e


@triton.jit
def gained(q, y, z, top_z, lse_z):
    """Return ``p - q`` and ``q psi(y)`` of each column."""
    near, far = tl.abs(y) < NEAR, y >= FAR
    series = psi_series(y)
    power = exp(tl.where(far, (z - top_z[:, None]) - lse_z[:, None], y))
    more = tl.where(near, q * (y + series), tl.where(far, power, q * power) - q)
    return more, tl.where(near, q * series, more - q * y)


@triton.jit
def extras(z, top_z, lse_z, counts):
    """Return the entropy of a tile's own softmax, and the sum of its logits where `counts`."""
    log_p = (z - top_z[:, None]) - lse_z[:, None]
    return -tl.sum(exp(log_p) * log_p, 1), tl.sum(tl.where(counts, z, 0.0), 1)


# --- backward: eq. (9), from the state of the whole row ---------------------------------------------------------------


@triton.jit
def dz_of_both(z, r, top_z, top_r, lse_z, lse_r, gap, a, b, c):
    """Return dz of all columns but the label's. In rows with a = 0 or c = 0 it has the bits of `dz_of_one`."""
    y = exact_difference(z, r, top_z, top_r) - gap[:, None]
    q = softmax(r, top_r, lse_r)
    far = (y >= FAR) | (2.0 * tl.abs(a) < tl.abs(c))[:, None]
    power = exp(tl.where(far, (z - top_z[:, None]) - lse_z[:, None], y))
    more = tl.where(tl.abs(y) < NEAR, y + psi_series(y), power - 1.0)
    return tl.where(far, c[:, None] * power + a[:, None] * q, q * (b[:, None] + c[:, None] * more))


@triton.jit
def dz_of_one(x, top, lse, b):
    """Return dz of rows with a = 0, from the policy's logits, or with c = 0, from the reference's."""
    return b[:, None] * softmax(x, top, lse)


@triton.jit
def softmax(x, top, lse):
    return exp((x - top[:, None]) - lse[:, None])
