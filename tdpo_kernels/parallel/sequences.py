"""Compute the loss of sequences whose tokens lie on several ranks: sequence (context) parallelism."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import check_loss, check_tensor, is_int, wrong
from ..collectives import summed_
from ..loss import sequence_sums, sums_loss
from ..types import TDPOOutput, TokenStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def sequence_parallel_loss(
    stats: TokenStats, sequence_ids: Tensor, pairs: int, group: ProcessGroup | None = None, *, beta: float = 0.1,
    alpha: float | None = None, variant: str = "tdpo2", reduction: str = "mean",
) -> TDPOOutput:  # fmt: skip
    """Return the preference loss of sequences that are split over the ranks of `group`, from each rank's tokens.

    A sigmoid is not linear: per-sequence sums (eq. 3) are added up over the ranks before it, ``48 P + 8`` bytes. Every
    rank returns the same loss. Its backward gives a rank the gradient through the rank's own tokens, and the sum over
    the ranks is the loss's gradient. Where gradients are averaged over the group (DDP, FSDP), multiply the loss by the
    group's size. It sees statistics and no head, so logits that `token_stats` had no room for are made twice.

    Args:
        stats: this rank's, from ``token_stats(..., shift=False)``. Shift labels before splitting them: label t is the
            one that hidden state t predicts, even where its token lies on another rank.
        sequence_ids: int64, shaped like ``stats.logp``: 0 to P - 1 for the chosen, P to 2 P - 1 for their rejected
            partners, in any order. Where the label is ignored (padding) any of these will do.
        pairs: P, counted over all ranks, and equal on all of them.
        beta, alpha, variant, reduction: as in `tdpo_kernels.fused_tdpo_loss`.

    Raises:
        TypeError, ValueError: if an argument is wrong; the message says which, what was seen and what is wanted.
    """
    terms = check_loss(beta, alpha, variant, reduction)
    check_tensor(sequence_ids, "sequence_ids")
    if sequence_ids.shape != stats.logp.shape or sequence_ids.dtype not in (torch.int64, torch.int32):
        raise wrong("sequence_ids", sequence_ids, f"int64 or int32 {tuple(stats.logp.shape)} as stats.logp has")
    if not is_int(pairs) or pairs < 1:
        raise wrong("pairs", pairs, "an int >= 1")
    group = dist.group.WORLD if group is None else group
    astray = (sequence_ids < 0) | (sequence_ids >= 2 * pairs)
    own = torch.cat([_own_sums(stats, sequence_ids, 2 * pairs).flatten(), astray.sum(dtype=torch.float64)[None]])
    total = _Summed.apply(own, group)
    if found := int(total[-1]):  # raised on every rank, or the others would wait
        raise ValueError(f"sequence_ids: got {found} outside [0, {2 * pairs}), wanted none, ignored labels included")
    sums = total[:-1].view(3, -1)
    return sums_loss(*sums, stats, terms, reduction)


def _own_sums(stats: TokenStats, sequence_ids: Tensor, count: int) -> Tensor:
    """Return sums ``(3, S)`` over this rank's tokens, in float64 and in a fixed order. Ignored tokens are zero."""
    ids_N = sequence_ids.reshape(-1).long().clamp(0, count - 1)
    order_N = ids_N.argsort(stable=True)
    ends_S = torch.searchsorted(ids_N[order_N], torch.arange(count, device=ids_N.device), right=True)
    tokens_3N = torch.stack([x.reshape(-1) for x in (stats.logp, stats.ref_logp, stats.kl)])
    return sequence_sums(tokens_3N[:, order_N], torch.nn.functional.pad(ends_S, (1, 0)))


class _Summed(torch.autograd.Function):
    """Sum over the ranks. Backward hands the gradient through, because each rank's share has that of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return summed_(x.clone(), group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None
