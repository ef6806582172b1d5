"""Compute what a run logs, as sums and counts, which add up over batches and processes. Their quotients are means over
pairs or tokens, however these were batched.

Rewards are the paper's, ``beta * (log-ratio + KL)``: unlike DPO's they include the sequence's KL.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .kernels import TDPOOutput, TokenStats

EXTRAS = ("entropy", "mean_logit", "is_argmax")
OVER_PAIRS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "kl/chosen", "kl/rejected", "kl/margin",
)  # fmt: skip
OVER_TOKENS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")
AUX_LOSS = "aux_loss"  # a mixture of experts' alone
TOKENS_SEEN = "num_tokens"
NAMES = (*OVER_PAIRS, *OVER_TOKENS, AUX_LOSS, TOKENS_SEEN)


@torch.no_grad()
def pair_sums(
    out: TDPOOutput, stats: TokenStats, completion: Tensor, lengths: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Return ``(P, len(NAMES), 2)``: what each pair of a batch adds to the sum and to the count of each name.

    Args:
        out: of a batch whose loss is one per pair, or their mean, which then stands for each of them.
        completion: bool, ``(2P, L)``, or ``(N,)`` with `cu_seqlens`. A sequence's first token has no predictor and does
            not count.
        lengths: ``(2P,)``, the tokens of each sequence, prompts included.
        cu_seqlens: ``(2P + 1,)``, where sequences begin in a row without padding; None: rows are padded.
    """
    chosen, rejected = out.chosen_rewards, out.rejected_rewards
    margin = chosen - rejected
    kl_margin = out.chosen_kl - out.rejected_kl
    of_pairs = (
        out.loss.detach().expand_as(margin), chosen, rejected, (margin > 0).to(margin), margin,
        out.chosen_logps, out.rejected_logps, out.chosen_kl, out.rejected_kl, kl_margin,
    )  # fmt: skip
    counted = completion.clone()
    if cu_seqlens is None:
        counted[:, 0] = False
    else:
        counted[cu_seqlens[:-1][lengths > 0].long()] = False
    counts = _per_sequence(counted.to(_wide(margin)), cu_seqlens)
    of_rows = {name: _per_sequence(stats.extras[name].to(_wide(margin)), cu_seqlens) for name in EXTRAS}
    (logit_w, logit_l), (tokens_w, tokens_l) = of_rows["mean_logit"].chunk(2), counts.chunk(2)
    of_tokens = (
        (_of_pair(of_rows["entropy"]), _of_pair(counts)), (logit_w, tokens_w), (logit_l, tokens_l),
        (of_rows["is_argmax"].chunk(2)[0], tokens_w), (torch.zeros_like(margin), torch.zeros_like(margin)),
        (_of_pair(lengths), torch.ones_like(tokens_w)),
    )  # fmt: skip
    columns = [*((x, torch.ones_like(x)) for x in of_pairs), *of_tokens]
    return torch.stack([torch.stack([x.to(_wide(margin)) for x in pair], -1) for pair in columns], 1)


@torch.no_grad()
def with_aux_loss(sums: Tensor, aux_loss: Tensor, weight: float) -> Tensor:
    """Return `pair_sums` with a mixture's auxiliary loss, and with its part in each pair's loss."""
    sums = sums.clone()
    sums[:, NAMES.index("loss"), 0] += weight * aux_loss
    sums[:, NAMES.index(AUX_LOSS)] = torch.stack([aux_loss, torch.ones_like(aux_loss)]).to(sums)
    return sums


def _per_sequence(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return x.sum(-1) if cu_seqlens is None else torch.segment_reduce(x, "sum", offsets=cu_seqlens.long())


def _of_pair(rows: Tensor) -> Tensor:
    chosen, rejected = rows.chunk(2)
    return chosen + rejected


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64


def total_over_processes(sums: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """``(len(NAMES), 2)`` on the CPU: `pair_sums` of one batch over its pairs and all processes, in one gather."""
    return gather(sums.sum(0)[None]).sum(0).cpu().double()


def means_of(total: Tensor) -> dict[str, float]:
    """Return means by name (``num_tokens``: the sum), of totals of any number of batches.

    Nothing counted is 0, as in TRL, but for ``aux_loss``, which then is left out.
    """
    counted = dict(zip(NAMES, total.tolist(), strict=True))
    if not counted[AUX_LOSS][1]:
        del counted[AUX_LOSS]
    means = {name: value / count if count else 0.0 for name, (value, count) in counted.items()}
    return means | {TOKENS_SEEN: counted[TOKENS_SEEN][0]}


def over_processes(sums: Tensor, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """`means_of` one batch, over all processes."""
    return means_of(total_over_processes(sums, gather))
