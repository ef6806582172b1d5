"""Compute the preference loss from per-token statistics by eqs. (3) to (5) of `reference.py`, which stand only here."""

from __future__ import annotations

from typing import NamedTuple

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


class Terms(NamedTuple):
    """Hold the numbers of a loss: eqs. (4) and (5), the weight of an SFT term, and whether (3) takes means.

    Of a pair, the SFT term is the chosen completion's mean negative log-probability a token.
    """

    beta: float
    alpha: float
    variant: str
    sft_weight: float = 0.0
    length_normalized: bool = False


def preference_loss(
    stats: TokenStats, terms: Terms, reduction: str, cu_seqlens: Tensor | None = None, counted: Tensor | None = None
) -> TDPOOutput:
    """Return the loss in the statistics' dtype; everything before it is computed in float64.

    counted: which labels count, in their shape, where `terms` have a use for numbers of tokens.
    """
    sums = (sequence_sums(x, cu_seqlens) for x in (stats.logp, stats.ref_logp, stats.kl))
    count_S = None if counted is None else sequence_sums(counted, cu_seqlens)
    return sums_loss(*sums, stats, terms, reduction, count_S)


def sums_loss(
    logp_S: Tensor, ref_S: Tensor, kl_S: Tensor, stats: TokenStats, terms: Terms, reduction: str,
    count_S: Tensor | None = None,
) -> TDPOOutput:  # fmt: skip
    """Return the loss from each sequence's sums of `stats`, in their dtype, and from its number of tokens."""
    dtype, (beta, alpha, variant, sft_weight, _) = stats.logp.dtype, terms
    per_S = _per_token(terms, count_S)
    margin_S = (logp_S - ref_S) * per_S  # in fp32 two sums of hundreds of nats would cancel
    (m_w, m_l), (k_w, k_l) = margin_S.chunk(2), (kl_S * per_S).chunk(2)
    loss_P = -F.logsigmoid(beta * _preference(m_w - m_l, k_w, k_l, alpha, variant))
    if sft_weight:
        loss_P = loss_P - sft_weight * (logp_S / count_S.clamp(min=1)).chunk(2)[0]
    loss = loss_P if reduction == "none" else getattr(loss_P, reduction)()
    with torch.no_grad():
        rewards_S = beta * (margin_S + kl_S * per_S)
        shown_8P = torch.stack((logp_S, ref_S, kl_S, rewards_S)).to(dtype).view(8, -1)
    return TDPOOutput(loss.to(dtype), *shown_8P.unbind(), stats.detach())


def sums_gradient(
    logp_S: Tensor, ref_S: Tensor, kl_S: Tensor, terms: Terms, count_S: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the gradients of the sum of all pairs' losses in `logp_S` and in `kl_S`."""
    beta, alpha, variant, sft_weight, _ = terms
    per_S = _per_token(terms, count_S)
    (m_w, m_l), (k_w, k_l) = ((logp_S - ref_S) * per_S).chunk(2), (kl_S * per_S).chunk(2)
    g_P = -beta * torch.sigmoid(-beta * _preference(m_w - m_l, k_w, k_l, alpha, variant))
    g_S = torch.cat([g_P, -g_P]) * per_S
    g_w, g_l = g_S.chunk(2)
    g_kl_S = g_S if variant == "tdpo1" else torch.cat([0.0 * g_w, alpha * g_l])
    if sft_weight:
        g_S = torch.cat([g_w - sft_weight / count_S.chunk(2)[0].clamp(min=1), g_l])
    return g_S, g_kl_S


def cotangent_ratios(terms: Terms) -> tuple[float, ...]:
    """Return g_kl / g_logp of the tokens of chosen and of rejected sequences, whatever the loss: eq. (4).

    There is no such ratio, (), where an SFT term adds to g_logp of tokens whose g_kl is not 0.
    """
    if terms.variant == "tdpo1":
        return () if terms.sft_weight else (1.0, 1.0)
    return 0.0, terms.alpha


def _per_token(terms: Terms, count_S: Tensor | None) -> Tensor | float:
    """Return what eq. (3)'s sums are multiplied by: 1, or a token's share of its sequence."""
    return 1.0 / count_S.clamp(min=1) if terms.length_normalized else 1.0


def _preference(margin_P: Tensor, k_w: Tensor, k_l: Tensor, alpha: float, variant: str) -> Tensor:
    """Return h of eq. (4). DPO (alpha = 0) has no d, because 0 x (inf - inf) would be NaN."""
    if variant == "tdpo1":
        return margin_P - (k_l - k_w)
    return margin_P.sub(k_l - k_w.detach(), alpha=alpha) if alpha else margin_P
