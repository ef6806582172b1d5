"""Eqs. (3) to (5) of `reference.py`: from per-token statistics to the preference loss. The only copy; tiny tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import TDPOOutput, TokenStats

VARIANTS = ("tdpo1", "tdpo2")
REDUCTIONS = ("mean", "sum", "none")
DEFAULT_ALPHA = 0.5


def sequence_sums(per_token: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``(S, L) -> (S,)``, or ``(N,) -> (S,)`` between the offsets. Deterministic; an empty sequence sums to 0."""
    if cu_seqlens is None:
        return per_token.sum(-1)
    return torch.segment_reduce(per_token, "sum", lengths=cu_seqlens.diff().long(), initial=0.0, unsafe=True)


def preference_loss(
    stats: TokenStats, *, beta: float, alpha: float, variant: str, reduction: str, cu_seqlens: Tensor | None = None
) -> TDPOOutput:
    # the margin token by token: two sums of hundreds of nats would cancel
    per_token = (stats.logp.detach(), stats.ref_logp, stats.kl, stats.logp - stats.ref_logp)
    logp_S, ref_S, kl_S, margin_S = (sequence_sums(x, cu_seqlens) for x in per_token)
    (m_w, m_l), (k_w, k_l) = margin_S.chunk(2), kl_S.chunk(2)
    d_P = k_l - k_w if variant == "tdpo1" else alpha * (k_l - k_w.detach())
    loss_P = -F.logsigmoid(beta * ((m_w - m_l) - d_P))
    loss = loss_P if reduction == "none" else getattr(loss_P, reduction)()
    reward_S = beta * (margin_S + kl_S).detach()
    halves = [half for x in (logp_S, ref_S, kl_S.detach(), reward_S) for half in x.chunk(2)]
    return TDPOOutput(loss, *halves)
