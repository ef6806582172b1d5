r"""Specify TDPO's token statistics in plain torch, in any dtype including float64: slow, large, and right.

Notation: ``z = head(h)`` the policy's logits, ``r = ref_head(h')`` the reference's, ``p = softmax z``, ``q = softmax
r``, ``L = logsumexp z``, ``L' = logsumexp r``, ``y`` the label.
Tokens are packed (T of them), sequences are ``S = 2P``: the P chosen, then their P rejected.

Per token (Zeng et al. 2024, arXiv 2404.11999, eqs. 9 and 10; the KL runs from the reference, forward, and is never
clamped)::

    (1)  logp = z[y] - L                  ref_logp = r[y] - L'
    (2)  kl   = KL(q || p) = sum_v q_v (log q_v - log p_v)

Per sequence and pair::

    (3)  m_s  = sum over tokens of s of (logp - ref_logp)    k_s = sum over tokens of s of kl    (no length norm)
    (4)  h    = (m_w - m_l) - d      TDPO1: d = k_l - k_w        TDPO2: d = alpha * (k_l - stopgrad(k_w))
    (5)  loss = -log sigmoid(beta * h), mean over pairs          reward_s = beta * (m_s + k_s), detached

Gradients, with g_logp and g_kl the cotangents of (1) and (2) at a token::

    (6)  dz = g_logp * (1[y] - p) + g_kl * (p - q)
    (7)  dh = dz W        dW = dz^T h        db = sum dz

In (2) nearly equal numbers cancel where the two models nearly agree. Because ``sum_v (p_v - q_v) = 0``, it is also a
sum of terms that are never negative, with ``psi(x) = e^x - 1 - x``; this file computes it so::

    (2a)  kl = sum_v q_v psi(log p_v - log q_v)

Backends never see a whole row. To them a vocabulary is made of *parts*: a tile, a rank's shard, or the label alone. For
parts of masses P_k (policy) and Q_k (reference) within a whole, and ``Y_k = log P_k - log Q_k``::

    (8)  KL = sum_k [ Q_k KL_k + Q_k psi(Y_k) ] - e^2 / 2        e = sum_k (P_k - Q_k)        gap = L - L' + e

A column is a part whose KL is 0. So (8) reduces a tile, merges tiles and ranks, and lets the label join. In exact
arithmetic e is 0. But L - L' is rounded, which makes all Y_k too large by one number, and the sum of P_k - Q_k comes
out as that number, e. So e is added to the *gap*, the difference of the log-sum-exps, and psi(e) is taken off the KL.

With ``a = -g_kl``, ``b = -g_logp``, ``c = b - a`` and ``y = log p - log q`` of the whole row, (6) becomes::

    (9)  dz = q (b + c expm1(y))            at the label  -(b Q_0 - c (p_y - q_y))      for y < 8 and |a| >= |c| / 2
         dz = c p + a q                     at the label  -(b P_0 + a (p_y - q_y))      elsewhere

where P_0 and Q_0 are the masses outside the label. The two lines are equal. The first has the digits where p and q
nearly agree, or the cotangents do; the second where p dwarfs q, or a is small beside b. In neither does anything cancel
unless dz itself is small, however sure of the label a model is.
Consequences that tests hold: rows of dz sum to 0; rows with g_kl = 0 need no q (DPO, the chosen half of TDPO2), and
rows with g_kl = g_logp no p (TDPO1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import LMHead

EXTRAS = ("entropy", "mean_logit", "is_argmax")


def logits(hidden_TD: Tensor, head: LMHead, dtype: torch.dtype) -> Tensor:
    """Return ``(T, V)`` logits in `dtype`; 16-bit operands are multiplied exactly, never rounded to 16-bit logits."""
    bias = None if head.bias is None else head.bias.to(dtype)
    z_TV = F.linear(hidden_TD.to(dtype), head.weight.to(dtype), bias)
    if head.logit_scale != 1.0:
        z_TV = z_TV * head.logit_scale
    if head.softcap is None:
        return z_TV
    z_TV = head.softcap * torch.tanh(z_TV / head.softcap)
    return z_TV if bias is None else z_TV.masked_fill(torch.isneginf(bias), -torch.inf)


def forward_kl(log_p_TV: Tensor, log_q_TV: Tensor) -> Tensor:
    """Return KL(q || p) of each row by eq. (2a). Entries at -inf in both contribute 0; in p alone they make it inf."""
    nowhere = torch.isneginf(log_p_TV) & torch.isneginf(log_q_TV)
    missed = torch.isneginf(log_p_TV) & ~nowhere  # inf even where q rounds to 0; the gradient is p - q as elsewhere
    delta = (log_q_TV - log_p_TV).masked_fill(nowhere, 0.0)
    near = delta.abs() < 1
    x = torch.where(near, delta, 0.0)
    q = log_q_TV.exp()
    far = torch.where(near | (q == 0), 0.0, delta)
    terms = torch.where(near, q * (torch.expm1(-x) + x), log_p_TV.exp() - q + q * far)
    return terms.sum(-1) + torch.where(missed.any(-1), torch.inf, 0.0)


def statistics(z_TV: Tensor, r_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return eqs. (1) and (2) from logits: logp, ref_logp, kl, each ``(T,)``."""
    log_p, log_q = z_TV.log_softmax(-1), r_TV.log_softmax(-1)
    pick = labels_T[:, None]
    return log_p.gather(1, pick)[:, 0], log_q.gather(1, pick)[:, 0], forward_kl(log_p, log_q)


def extra_statistics(z_TV: Tensor, labels_T: Tensor) -> dict[str, Tensor]:
    """Return the policy's entropy (nats), mean logit over V, and whether the label is the argmax (0/1)."""
    log_p = z_TV.log_softmax(-1)
    entropy = -torch.where(torch.isneginf(log_p), 0.0, log_p.exp() * log_p).sum(-1)
    is_argmax = z_TV.gather(1, labels_T[:, None])[:, 0] >= z_TV.amax(-1)
    return {"entropy": entropy, "mean_logit": z_TV.mean(-1), "is_argmax": is_argmax.to(z_TV.dtype)}
