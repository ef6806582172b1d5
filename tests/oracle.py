"""The equations (1) to (6) in Python floats, one token or one pair at a time. No library, no torch, only `math`.

It is the truth the float64 reference is itself held to, so it takes no short cut: sums are `math.fsum`, and the KL is
a sum of terms that are never negative and never the difference of large numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Vector = Sequence[float]


def logits(
    hidden: Vector,
    weight: Sequence[Vector],
    bias: Vector | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> list[float]:
    """``softcap * tanh(logit_scale * (h W^T + b) / softcap)``; -inf where the bias is, whatever scale and cap are."""
    out = []
    for v, row in enumerate(weight):
        x = math.fsum(h * w for h, w in zip(hidden, row, strict=True)) + (0.0 if bias is None else bias[v])
        x *= logit_scale
        x = x if softcap is None else softcap * math.tanh(x / softcap)
        out.append(-math.inf if bias is not None and bias[v] == -math.inf else x)
    return out


def logsumexp(x: Vector) -> float:
    top = max(x)
    return top if top == -math.inf else top + math.log(math.fsum(math.exp(v - top) for v in x))


def log_softmax(x: Vector) -> list[float]:
    whole = logsumexp(x)
    return [v - whole for v in x]


def logp(z: Vector, label: int) -> float:
    """Eq. (1); for ref_logp give it r."""
    return z[label] - logsumexp(z)


def phi(x: float) -> float:
    """``expm1(-x) + x``, by its series where that would cancel."""
    if abs(x) > 0.5:
        return math.exp(-x) - 1.0 + x
    term, total = x * x / 2, []
    for n in range(3, 24):
        total.append(term)
        term *= -x / n
    return math.fsum(total)


def kl(z: Vector, r: Vector) -> float:
    """Eq. (2): KL(q || p), as the sum of ``q phi(log q - log p) >= 0``; inf where q > 0 = p."""
    terms = []
    for log_p, log_q in zip(log_softmax(z), log_softmax(r), strict=True):
        if log_q == -math.inf:
            terms.append(math.exp(log_p))
        elif log_p == -math.inf:
            return math.inf
        elif log_p - log_q > 700:
            terms.append(math.exp(log_p))
        else:
            terms.append(math.exp(log_q) * phi(log_q - log_p) if abs(log_q - log_p) <= 0.5 else _far(log_p, log_q))
    return math.fsum(terms)


def _far(log_p: float, log_q: float) -> float:
    q = math.exp(log_q)
    return math.fsum((math.exp(log_p), -q, q * (log_q - log_p)))


def dz(z: Vector, r: Vector, label: int, g_logp: float, g_kl: float) -> list[float]:
    """Eq. (6), as ``g_logp (1[y] - p) - g_kl (q - p)`` with q - p free of cancellation."""
    out = []
    for v, (log_p, log_q) in enumerate(zip(log_softmax(z), log_softmax(r), strict=True)):
        one_minus_p = -math.expm1(log_p) if v == label else -math.exp(log_p)
        out.append(g_logp * one_minus_p - g_kl * _q_minus_p(log_p, log_q))
    return out


def _q_minus_p(log_p: float, log_q: float) -> float:
    if log_p == -math.inf or log_q == -math.inf or abs(log_q - log_p) > 1:
        return math.exp(log_q) - math.exp(log_p)
    return math.exp(log_p) * math.expm1(log_q - log_p)


class Sequence_(NamedTuple):
    """One sequence's per-token statistics."""

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


def pair(chosen: Sequence_, rejected: Sequence_, beta: float, alpha: float, variant: str) -> Pair:
    """Eqs. (3) to (5) and their derivatives. TDPO2 stops the gradient at the chosen KL; TDPO1 has no alpha."""
    m_w, m_l = (math.fsum((*s.logp, *(-x for x in s.ref_logp))) for s in (chosen, rejected))
    k_w, k_l = math.fsum(chosen.kl), math.fsum(rejected.kl)
    weight = 1.0 if variant == "tdpo1" else alpha
    margin = beta * ((m_w - m_l) - weight * (k_l - k_w))
    slope = -beta * sigmoid(-margin)  # d loss / d h
    g_chosen = (slope, slope if variant == "tdpo1" else 0.0)
    return Pair(-log_sigmoid(margin), beta * (m_w + k_w), beta * (m_l + k_l), g_chosen, (-slope, -slope * weight))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x: float) -> float:
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))
