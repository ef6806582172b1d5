r"""The specification: TDPO's token statistics in plain torch, any dtype including float64. Slow, large, and right.

Notation: ``z = head(h)`` the policy's logits, ``r = ref_head(h')`` the reference's, ``p = softmax z``, ``q = softmax
r``, ``L = logsumexp z``, ``L' = logsumexp r``, ``y`` the label, ``delta = r - z`` and ``delta' = delta + L - L' =
log q - log p``.
Tokens are packed (T of them), sequences are ``S = 2P``: the P chosen, then their P rejected.

Per token (Zeng et al. 2024, arXiv 2404.11999, eqs. 9 and 10; the KL runs from the reference, forward, and is never
clamped)::

    (1)  logp = z[y] - L                  ref_logp = r[y] - L'
    (2)  kl   = KL(q || p) = sum_v q_v (log q_v - log p_v) = E_q[delta] - L' + L

Per sequence and pair::

    (3)  m_s  = sum over tokens of s of (logp - ref_logp)        k_s = sum over tokens of s of kl        (no length
    norm)
    (4)  h    = (m_w - m_l) - d      TDPO1: d = k_l - k_w        TDPO2: d = alpha * (k_l - stopgrad(k_w))
    (5)  loss = -log sigmoid(beta * h), mean over pairs          reward_s = beta * (m_s + k_s), detached

Gradients, with g_logp and g_kl the cotangents of (1) and (2) at a token::

    (6)  dz = g_logp * 1[y] + (g_kl - g_logp) * p - g_kl * q  =  g_logp * (1[y] - p) - g_kl * p * expm1(delta')
    (7)  dh = dz W        dW = dz^T h        db = sum dz

Forms of (2) that do not cancel where the two models nearly agree. Since ``sum_v (p_v - q_v) = 0``, with
``phi(x) = expm1(-x) + x >= 0``::

    (2a)  kl = sum_v [ q_v * delta'_v + p_v - q_v ] = E_q[ phi(delta') ]                     needs L and L' first
    (2b)  kl = log1p( E_q[ phi(delta - mu) ] ),   mu = E_q[delta],   L - L' = kl - mu        one pass, ignores offsets

(2a) is what this file computes, and what tiles in memory use, with ``p_v - q_v`` from a tanh
(`backends/tile_math.py`); (2b), with its exact merge of parts of the vocabulary, is what tiles in registers use
(`device/math.py`). Consequences of (6) that tests hold: rows of dz sum to 0; rows with g_kl = 0 need no q
(DPO, the chosen half of TDPO2), rows with g_kl = g_logp need no p (TDPO1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import LMHead

EXTRAS = ("entropy", "mean_logit", "is_argmax")


def logits(hidden_TD: Tensor, head: LMHead, dtype: torch.dtype) -> Tensor:
    """``(T, V)`` logits in `dtype`; 16-bit operands are multiplied exactly, never rounded to 16-bit logits."""
    bias = None if head.bias is None else head.bias.to(dtype)
    z_TV = F.linear(hidden_TD.to(dtype), head.weight.to(dtype), bias)
    if head.logit_scale != 1.0:
        z_TV = z_TV * head.logit_scale
    return z_TV if head.softcap is None else head.softcap * torch.tanh(z_TV / head.softcap)


def forward_kl(log_p_TV: Tensor, log_q_TV: Tensor) -> Tensor:
    """KL(q || p) per row by eq. (2a). Entries at -inf in both contribute 0; at -inf in p alone they make it inf."""
    nowhere = torch.isneginf(log_p_TV) & torch.isneginf(log_q_TV)
    missed = torch.isneginf(log_p_TV) & ~nowhere  # inf, though q be 0 in this dtype; the gradient is p - q as elsewhere
    delta = (log_q_TV - log_p_TV).masked_fill(nowhere, 0.0)
    near = delta.abs() < 1
    x = torch.where(near, delta, 0.0)
    q = log_q_TV.exp()
    far = torch.where(near | (q == 0), 0.0, delta)
    terms = torch.where(near, q * (torch.expm1(-x) + x), log_p_TV.exp() - q + q * far)
    return terms.sum(-1) + torch.where(missed.any(-1), torch.inf, 0.0)


def statistics(z_TV: Tensor, r_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eqs. (1) and (2) from logits: logp, ref_logp, kl, each ``(T,)``."""
    log_p, log_q = z_TV.log_softmax(-1), r_TV.log_softmax(-1)
    pick = labels_T[:, None]
    return log_p.gather(1, pick)[:, 0], log_q.gather(1, pick)[:, 0], forward_kl(log_p, log_q)


def extra_statistics(z_TV: Tensor, labels_T: Tensor) -> dict[str, Tensor]:
    """Statistics of the policy that trainers log: entropy (nats), mean logit over V, and whether the label is the
    argmax (0/1)."""
    log_p = z_TV.log_softmax(-1)
    entropy = -torch.where(torch.isneginf(log_p), 0.0, log_p.exp() * log_p).sum(-1)
    is_argmax = z_TV.gather(1, labels_T[:, None])[:, 0] >= z_TV.amax(-1)
    return {"entropy": entropy, "mean_logit": z_TV.mean(-1), "is_argmax": is_argmax.to(z_TV.dtype)}
