"""The equations (1) to (6) as they are written, one token or one pair at a time, in decimals of 50 digits.

It is the truth the float64 reference is itself held to, so it takes no short cut: what cancels leaves more digits than
anybody compares, and no exponential underflows. No library, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, localcontext
from functools import lru_cache, wraps
from typing import NamedTuple

Vector = Sequence[float]
EXACT = Context(prec=50, Emax=MAX_EMAX, Emin=MIN_EMIN)


def exactly(equation: Callable) -> Callable:
    """Make an equation be computed in `EXACT`."""

    @wraps(equation)
    def computed(*given: object) -> object:
        with localcontext(EXACT):
            return equation(*given)

    return computed


@exactly
def logits(
    hidden: Vector, weight: Sequence[Vector], bias: Vector | None, logit_scale: float, softcap: float | None
) -> list[float]:
    """``softcap * tanh(logit_scale * (h W^T + b) / softcap)``; -inf where the bias is, whatever scale and cap are."""
    rows = zip(weight, bias or [0.0] * len(weight), strict=True)
    return [_logit(hidden, row, b, logit_scale, softcap) for row, b in rows]


def _logit(hidden: Vector, row: Vector, bias: float, scale: float, cap: float | None) -> float:
    if bias == -math.inf:
        return bias
    x = Decimal(math.fsum((*(h * w for h, w in zip(hidden, row, strict=True)), bias))) * Decimal(scale)
    if cap is not None:
        down = (-2 * x / Decimal(cap)).exp()
        x = Decimal(cap) * (1 - down) / (1 + down)
    return float(x)


def softmax(x: Vector) -> list[Decimal]:
    return _softmax(tuple(x))


@lru_cache(maxsize=2)
def _softmax(x: tuple[float, ...]) -> list[Decimal]:
    every = [Decimal(v).exp() for v in x]
    total = sum(every)
    return [e / total for e in every]


@exactly
def logp(z: Vector, label: int) -> float:
    """Eq. (1); for ref_logp give it r."""
    return float(softmax(z)[label].ln())


@exactly
def kl(z: Vector, r: Vector) -> float:
    """Eq. (2): KL(q || p); inf where q > 0 = p."""
    pairs = list(zip(softmax(z), softmax(r), strict=True))
    return math.inf if any(q > p == 0 for p, q in pairs) else float(sum(q * (q / p).ln() for p, q in pairs if q))


@exactly
def dz(z: Vector, r: Vector, label: int, g_logp: float, g_kl: float) -> list[float]:
    """Eq. (6)."""
    pairs, (a, b) = zip(softmax(z), softmax(r), strict=True), map(Decimal, (g_logp, g_kl))
    return [float(a * ((v == label) - p) + b * (p - q)) for v, (p, q) in enumerate(pairs)]


class Tokens(NamedTuple):
    """The statistics of one sequence's tokens."""

    logp: Vector
    ref_logp: Vector
    kl: Vector


class Pair(NamedTuple):
    """The loss of one pair, both rewards, and what the loss sends back to each token: d loss / d (logp, kl)."""

    loss: float
    chosen_reward: float
    rejected_reward: float
    g_chosen: tuple[float, float]
    g_rejected: tuple[float, float]


@exactly
def pair(chosen: Tokens, rejected: Tokens, beta: float, alpha: float, variant: str) -> Pair:
    """Eqs. (3) to (5) and their derivatives. TDPO2 stops the gradient at the chosen KL; TDPO1 has no alpha."""
    m_w, m_l = (Decimal(math.fsum((*s.logp, *(-x for x in s.ref_logp)))) for s in (chosen, rejected))
    k_w, k_l = (Decimal(math.fsum(s.kl)) for s in (chosen, rejected))
    beta, weight = Decimal(beta), Decimal(1.0 if variant == "tdpo1" else alpha)
    right = 1 / (1 + (-beta * ((m_w - m_l) - weight * (k_l - k_w))).exp())  # sigmoid
    slope = beta * (right - 1)  # d loss / d h
    g_chosen, g_rejected = (slope, slope if variant == "tdpo1" else 0), (-slope, -slope * weight)
    values = -right.ln(), beta * (m_w + k_w), beta * (m_l + k_l)
    return Pair(*map(float, values), *(tuple(map(float, g)) for g in (g_chosen, g_rejected)))
