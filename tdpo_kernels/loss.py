"""Compute the preference loss from per-token statistics by eqs. (3) to (5) of `reference.py`, which stand only here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import TDPOOutput, TokenStats

VARIANTS = ("tdpo1", "tdpo2")
REDUCTIONS = ("mean", "sum", "none")
DEFAULT_ALPHA = 0.5


def sequence_sums(per_token: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return float64 sums over each sequence: of ``(..., S, L)``, or of ``(..., N)`` between the offsets.

    The sums are deterministic, and 0 for an empty sequence. Packed sequences may be summed one token after the other,
    which in fp32 is nats off at 10^5 tokens.
    """
    wide = per_token.dtype if per_token.device.type == "mps" else torch.float64  # MPS has no float64
    if cu_seqlens is None:
        return per_token.sum(-1, dtype=wide)
    lengths = cu_seqlens.diff().long().expand(*per_token.shape[:-1], -1)
    axis = per_token.dim() - 1
    return torch.segment_reduce(per_token.to(wide), "sum", lengths=lengths, axis=axis, initial=0.0, unsafe=True)


def preference_loss(
    stats: TokenStats, *, beta: float, alpha: float, variant: str, reduction: str, cu_seqlens: Tensor | None = None
) -> TDPOOutput:
    """Return the loss in the statistics' dtype; everything before it is computed in float64."""
    sums = (sequence_sums(x, cu_seqlens) for x in (stats.logp, stats.ref_logp, stats.kl))
    return sums_loss(*sums, stats, beta=beta, alpha=alpha, variant=variant, reduction=reduction)


def sums_loss(
    logp_S: Tensor, ref_S: Tensor, kl_S: Tensor, stats: TokenStats, *, beta: float, alpha: float, variant: str,
    reduction: str,
) -> TDPOOutput:  # fmt: skip
    """Return the loss from each sequence's sums of `stats`, in their dtype."""
    dtype = stats.logp.dtype
    margin_S = logp_S - ref_S  # in fp32 two sums of hundreds of nats would cancel
    (m_w, m_l), (k_w, k_l) = margin_S.chunk(2), kl_S.chunk(2)
    loss_P = -F.logsigmoid(beta * _preference(m_w - m_l, k_w, k_l, alpha, variant))
    loss = loss_P if reduction == "none" else getattr(loss_P, reduction)()
    with torch.no_grad():
        rewards_S = beta * (margin_S + kl_S)
        shown_8P = torch.stack((logp_S, ref_S, kl_S, rewards_S)).to(dtype).view(8, -1)
    return TDPOOutput(loss.to(dtype), *shown_8P.unbind(), stats.detach())


def sums_gradient(logp_S: Tensor, ref_S: Tensor, kl_S: Tensor, *, beta: float, alpha: float, variant: str) -> Tensor:
    """Return the gradient of the sum of all pairs' losses in `logp_S`. In `kl_S` it is `cotangent_ratios` as large."""
    (m_w, m_l), (k_w, k_l) = (logp_S - ref_S).chunk(2), kl_S.chunk(2)
    g_P = -beta * torch.sigmoid(-beta * _preference(m_w - m_l, k_w, k_l, alpha, variant))
    return torch.cat([g_P, -g_P])


def cotangent_ratios(alpha: float, variant: str) -> tuple[float, float]:
    """Return g_kl / g_logp of the tokens of chosen and of rejected sequences, whatever the loss: eq. (4)."""
    return (1.0, 1.0) if variant == "tdpo1" else (0.0, alpha)


def _preference(margin_P: Tensor, k_w: Tensor, k_l: Tensor, alpha: float, variant: str) -> Tensor:
    """Return h of eq. (4). DPO (alpha = 0) has no d, because 0 x (inf - inf) would be NaN."""
    if variant == "tdpo1":
        return margin_P - (k_l - k_w)
    return margin_P.sub(k_l - k_w.detach(), alpha=alpha) if alpha else margin_P
