r"""Row mathematics of a tile of logits, pointer-free.

Tiles are fp32 ``(R, C)``, row values ``(R,)``. LOWEST stands for -inf: in entries that a bias rules out and in columns
past V, so that inf - inf never happens.

The state of a row over the part of the vocabulary seen so far is six numbers. ``m_z`` and ``m_r`` are the largest
logits, and the others are relative to them, so that an offset between the models costs no digits:

    s_z = sum_v e^(z_v - m_z)        s_r = sum_v e^(r_v - m_r)        mean = E_q[(z - m_z) - (r - m_r)]
    M = sum_v e^(r_v - m_r) psi((z_v - m_z) - (r_v - m_r) - mean)     psi(y) = e^y - 1 - y

They are sums, not logarithms: a tile that raises no maximum adds without rounding what is there. With ``phi = M / s_r``
they say, by eq. (2b) of `reference.py` with the sign of delta turned, so that its exponential needs no negation,

    (12)   KL = log1p(phi)        L - L' = KL + mean        E_q[e^y] = 1 + phi = exp(lse_z - lse_r - mean)

Two parts' states, their anchors moved to the row's own, merge exactly, with ``w_k`` each one's share of s_r, ``mean =
sum w_k mean_k`` and ``Y_k = mean_k - mean``:

    (13)   phi = sum_k [ w_k (e^Y_k phi_k + psi(Y_k)) ]  =  sum_k [ exp(lse_z_k - L' - mean) - w_k (1 + Y_k) ]

where the second form is for large terms: it asks nothing of a part's own phi, which overflows where the reference all
but rules out what the policy likes. One exponential a column and model, and no second look at a tile that has been
merged: `backends/tile_math.py`, which has its tiles in memory, does with less.
"""

import math

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)
CUT = tl.constexpr(16.0)  # e^Y of a part is taken up to here; beyond, its mass says the same
LARGE = tl.constexpr(1e12)
TOP_EXPONENT = tl.constexpr(80.0)  # keeps exp() finite
ROUNDING = tl.constexpr(0.125)  # more than staging in 16 bits moves a sum of probabilities by, of itself
LEAST, MOST = tl.constexpr(math.log1p(-0.125)), tl.constexpr(math.log1p(0.125))  # so q is right where both are held
TINY = tl.constexpr(1.2e-38)
NEAR = tl.constexpr(0.35)  # series below, exponentials above
NEAR_TOPS = tl.constexpr(1.0)  # `tile_math.NEAR`


@triton.jit
def psi_series(y):
    """``e^y - 1 - y`` for |y| < NEAR, to 4e-9 of itself."""
    tail = 1.0 + y * (1.0 / 6) * (1.0 + y * (1.0 / 7) * (1.0 + y * (1.0 / 8)))
    return 0.5 * y * y * (1.0 + y * (1.0 / 3) * (1.0 + y * (1.0 / 4) * (1.0 + y * (1.0 / 5) * tail)))


@triton.jit
def psi(y):
    """``e^y - 1 - y >= 0``."""
    return tl.where(tl.abs(y) < NEAR, psi_series(y), tl.exp(y) - (1.0 + y))


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) < NEAR, x + psi_series(x), tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """For x > -1: ``2 atanh(x / (2 + x))`` by its series between -1/2 and 1."""
    s = x / (2.0 + x)
    u = s * s
    tail = 1.0 / 7 + u * (1.0 / 9 + u * (1.0 / 11 + u * (1.0 / 13 + u * (1.0 / 15))))
    near = 2.0 * s * (1.0 + u * (1.0 / 3 + u * (1.0 / 5 + u * tail)))
    return tl.where((x > -0.5) & (x < 1.0), near, tl.log(1.0 + x))


@triton.jit
def not_negative(x):
    """A nan stays one; on a device `tl.maximum` would drop it."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def kl_of(lse_z, lse_r, mean, phi):
    """Eq. (12); where 1 + phi nears what fp32 holds, L - L' - mean, which no longer cancels there."""
    return tl.where(phi < LARGE, log1p(phi), lse_z - lse_r - mean)


@triton.jit
def lse_diff_of(lse_z, lse_r, mean, phi):
    """L - L', without cancellation: mean + KL where that has the digits."""
    return tl.where(phi < LARGE, mean + log1p(phi), lse_z - lse_r)


# --- the head ---------------------------------------------------------------------------------------------------------


@triton.jit
def head(x, bias_C, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """``softcap * tanh(scale * (x + bias) / softcap)``; -inf becomes LOWEST."""
    if HAS_BIAS:
        x += bias_C[None, :]
    x *= scale
    if HAS_SOFTCAP:
        x = softcap * tanh(x / softcap)
    if HAS_BIAS:
        x = tl.where(x < LOWEST, LOWEST, x)
    return x


@triton.jit
def tanh(x):
    """``expm1(2|x|) / (expm1(2|x|) + 2)`` with the sign of x."""
    e = expm1(2.0 * tl.where(tl.abs(x) > 20.0, 20.0, tl.abs(x)))
    t = e / (e + 2.0)
    return tl.where(x < 0, -t, t)


@triton.jit
def softcap_slope(z, softcap):
    """d (softcap tanh(x / softcap)) / dx, from the capped logit."""
    u = z / softcap
    return 1.0 - u * u


# --- z - r ------------------------------------------------------------------------------------------------------------


@triton.jit
def anchored(z, r, m_z, m_r):
    """Both tiles less their tops where these are far apart; where they are not, as they are, for ``z - r`` to come
    first: `tile_math.half_log_ratio_` says why. And what is left to take off."""
    near = tl.abs(m_z - m_r) <= NEAR_TOPS
    z, r = z - tl.where(near, 0.0, m_z)[:, None], r - tl.where(near, 0.0, m_r)[:, None]
    return z, r, tl.where(near, m_z, 0.0), tl.where(near, m_r, 0.0)


@triton.jit
def above(z, r, m_z, m_r):
    """``(z - m_z) - (r - m_r)`` of what `anchored` returned."""
    return (z - r) - (m_z - m_r)[:, None]


@triton.jit
def raised(m_z, m_r, top_z, top_r):
    """What `above` gains where tops rise to `top_z` and `top_r`: `tile_math.rebase`."""
    apart, top_apart = m_z - m_r, top_z - top_r
    near = tl.maximum(tl.abs(apart), tl.abs(top_apart)) <= NEAR_TOPS
    return tl.where(near, apart - top_apart, (m_z - top_z) - (m_r - top_r))


# --- forward ----------------------------------------------------------------------------------------------------------


@triton.jit
def tile_state(z, r, m_z, m_r):
    """The state of one tile, but for its tops, of what `anchored` returned.

    Two passes over registers, the second about the first one's mean; phi is moved from there to its own mean, ``rest``
    away, by eq. (13). Where y is far from 0, q e^y is taken as an exponential of z: it cannot overflow
    before phi does. No exponential is taken twice, so that none is kept: registers are what the tile lacks.
    """
    e_r = tl.exp(r - m_r[:, None])
    s_r, s_z = tl.sum(e_r, 1), tl.sum(tl.exp(z - m_z[:, None]), 1)
    mean = tl.sum(e_r * above(z, r, m_z, m_r), 1) / s_r
    log_s = tl.log(s_r)
    y = above(z, r, m_z, m_r) - mean[:, None]
    q = tl.exp((r - m_r[:, None]) - log_s[:, None])
    rest = tl.sum(q * y, 1)
    mass = tl.exp(tl.minimum((z - m_z[:, None]) - (mean + log_s)[:, None], TOP_EXPONENT))
    phi = tl.sum(tl.where(tl.abs(y) < NEAR, q * psi_series(y), mass - q * (1.0 + y)), 1)
    moved_phi = not_negative(tl.exp(-rest) * (phi - psi(rest)))
    phi = tl.where(tl.abs(rest) < 1.0, moved_phi, phi)  # a mean without digits to move by: phi is LARGE, and stays so
    return s_z, s_r, mean + rest, phi * s_r


@triton.jit
def empty_state(like_R):
    """What merges with any state and leaves it as it is."""
    zero = like_R * 0.0
    lowest = zero + LOWEST
    return lowest, zero, lowest, zero, zero, zero


@triton.jit
def merge(m_z, s_z, m_r, s_r, mean, M, n_z, t_z, n_r, t_r, other_mean, N):
    """Eq. (13): two parts' states, (m_z, s_z, m_r, s_r, mean, M) and (n_z, t_z, n_r, t_r, other_mean, N), together."""
    top_z, top_r = tl.maximum(m_z, n_z), tl.maximum(m_r, n_r)
    mean += raised(m_z, m_r, top_z, top_r)
    other_mean += raised(n_z, n_r, top_z, top_r)
    a, b = tl.exp(m_r - top_r) * s_r, tl.exp(n_r - top_r) * t_r
    both = a + b
    new_mean = (a / both) * mean + (b / both) * other_mean
    first = moved(a, mean - new_mean, M, s_r, m_z - top_z - new_mean, s_z)
    second = moved(b, other_mean - new_mean, N, t_r, n_z - top_z - new_mean, t_z)
    total_z = tl.exp(m_z - top_z) * s_z + tl.exp(n_z - top_z) * t_z
    return top_z, total_z, top_r, both, new_mean, not_negative(first + second)


@triton.jit
def moved(weight, Y, M, s_r, log_mass, s_z):
    """M of a part of this (unnormalised) weight about another mean, Y below its own."""
    accurate = weight * (tl.exp(Y) * (M / tl.maximum(s_r, 1e-30)) + psi(Y))
    by_mass = tl.exp(tl.minimum(log_mass, TOP_EXPONENT)) * s_z - weight * (1.0 + Y)
    return tl.where((Y < CUT) & (M < s_r * LARGE), accurate, by_mass)


@triton.jit
def tile_extras(z, m_z, valid_C):
    """Of one tile: the sum of its logits, and ``sum_v e^(z_v - m_z) (z_v - m_z)``."""
    down = z - m_z[:, None]
    return tl.sum(tl.where(valid_C[None, :], z, 0.0), 1), tl.sum(tl.exp(down) * down, 1)


@triton.jit
def merged_extras(m_z, s_z, weighted, n_z, t_z, other):
    """The second of `tile_extras` of two parts together, relative to the larger of their tops."""
    top_z = tl.maximum(m_z, n_z)
    down, other_down = m_z - top_z, n_z - top_z
    return tl.exp(down) * (weighted + down * s_z) + tl.exp(other_down) * (other + other_down * t_z)


@triton.jit
def finish(s_z, s_r, M):
    """Of a state: lse_z and lse_r, relative to m_z and m_r, and phi."""
    return tl.log(s_z), tl.log(s_r), M / s_r


# --- what is staged ---------------------------------------------------------------------------------------------------


@triton.jit
def log_ratio(z, r, m_z, m_r, lse_diff, F):
    """t = log(p / q) within the part, held above -F, of what `anchored` returned."""
    return tl.maximum(above(z, r, m_z, m_r) - lse_diff[:, None], -F)


@triton.jit
def part_weights(lse_z, lse_r, lse_diff):
    """Of a part within the whole, from its log-sum-exps less the whole's: P, Q, and the ratio log(P / Q) that added to
    a column's t makes its log(p / q). Where P and Q are far apart, and the sum would have fewer digits than t, the
    ratio is 0; where they are not, it tells them apart, and P stands for both."""
    weight, near = tl.exp(lse_z), tl.abs(lse_diff) < 1.0
    return weight, tl.where(near, weight, tl.exp(lse_r)), tl.where(near, lse_diff, 0.0)


@triton.jit
def made_up(p, q, exact_t, kept_p, t, is_label):
    """What rounding p and t to `kept_p` and `t` did to a row's sums without the label: the factor on p and the summand
    on t that make both sums, of p and of ``q = p e^-t``, right again. Sums of q are had as what they are above those of
    p (before, that is the label's ``p - q``): where the two are equal, the summand is 0."""
    others = is_label == 0
    p_y, q_y = tl.sum(tl.where(is_label, p, 0.0), 1), tl.sum(tl.where(is_label, q, 0.0), 1)
    before = -difference(p_y, q_y, -tl.sum(tl.where(is_label, exact_t, 0.0), 1))
    after = tl.sum(tl.where(others, kept_p * expm1(-t), 0.0), 1)
    sum_p = tl.maximum(tl.sum(tl.where(others, p, 0.0), 1), TINY)
    found_p = tl.maximum(tl.sum(tl.where(others, kept_p, 0.0), 1), TINY)
    more = log_more(after / found_p) - log_more(before / sum_p)
    factor = tl.minimum(tl.maximum(sum_p / found_p, 1.0 - ROUNDING), 1.0 + ROUNDING)
    return factor, tl.minimum(tl.maximum(more, LEAST), MOST)


@triton.jit
def log_more(x):
    return log1p(tl.maximum(x, -0.999999))


@triton.jit
def weigh(p, q, t):
    """p such that, with the t that is kept, ``p e^-t`` is q to rounding: `tile_math.weigh_`."""
    return q * tl.exp(tl.minimum(t, 0.0)) + tl.maximum(p - q, 0.0)


@triton.jit
def difference(p, q, ratio):
    """``q - p``, where they agree from ``ratio = log(q / p)``."""
    return tl.where(tl.abs(ratio) < NEAR, p * (ratio + psi_series(ratio)), q - p)


# --- backward: eq. (6), a = -g_kl, b = -g_logp; lse_z, lse_r, lse_diff are relative to m_z and m_r -------------------


@triton.jit
def dz_from_both(z, r, m_z, m_r, lse_z, lse_r, lse_diff, a, b):
    """``b p + a (q - p)``; q - p is ``p expm1(delta')`` where p and q agree."""
    z, r, m_z, m_r = anchored(z, r, m_z, m_r)
    p, q = softmax(z, m_z, lse_z), softmax(r, m_r, lse_r)
    ratio = lse_diff[:, None] - above(z, r, m_z, m_r)
    return a[:, None] * difference(p, q, ratio) + b[:, None] * p


@triton.jit
def softmax(x, m, lse):
    """Rows that need p only (a = 0) or q only (a = b) take b times this."""
    return tl.exp((x - m[:, None]) - lse[:, None])


@triton.jit
def dz_from_stage(p, t, weight, ref_weight, ratio, a, b):
    """From what was staged of a part whose P, Q and ratio within the whole are given (`part_weights`)."""
    a_r, x = a * ref_weight, -ratio[:, None] - t
    near = tl.abs(x) < NEAR
    power = tl.where(near, x + psi_series(x), tl.exp(x))  # e^x - 1 where it is near 0, else e^x
    rest = tl.where(near, (b * weight + a * (ref_weight - weight))[:, None], ((b - a) * weight)[:, None])
    return p * (rest + a_r[:, None] * power)
