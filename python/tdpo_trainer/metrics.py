"""What a run logs, as sums and counts: they add up over processes, and their quotients are means over pairs or tokens.

Rewards are the paper's, ``beta * (log-ratio + KL)``: unlike DPO's they include the sequence's KL.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .kernels import TDPOOutput, TokenStats

EXTRAS = ("entropy", "mean_logit", "is_argmax")
OVER_PAIRS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    "kl/chosen", "kl/rejected", "kl/margin",
)  # fmt: skip
OVER_TOKENS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")
TOKENS_SEEN = "num_tokens"
NAMES = (*OVER_PAIRS, *OVER_TOKENS, TOKENS_SEEN)


@torch.no_grad()
def batch_sums(out: TDPOOutput, stats: TokenStats, completion: Tensor, attention_mask: Tensor) -> Tensor:
    """``(len(NAMES), 2)``: the sum and the count of each name over the pairs or the completion tokens of a batch.

    Args:
        completion: ``(2P, L)`` bool. The first column has no predictor, and does not count.
    """
    chosen, rejected = out.chosen_rewards, out.rejected_rewards
    margin = chosen - rejected
    kl_margin = out.chosen_kl - out.rejected_kl
    pairs = (
        chosen, rejected, (margin > 0).to(margin), margin, out.chosen_logps, out.rejected_logps,
        out.chosen_kl, out.rejected_kl, kl_margin,
    )  # fmt: skip
    counted = completion.clone()
    counted[:, 0] = False
    (tokens_w, tokens_l), (logit_w, logit_l) = counted.chunk(2), stats.extras["mean_logit"].chunk(2)
    right_w = stats.extras["is_argmax"].chunk(2)[0]
    tokens = ((stats.extras["entropy"], counted), (logit_w, tokens_w), (logit_l, tokens_l), (right_w, tokens_w))
    rows = [_sum_and_count(x, x.numel()) for x in pairs]
    rows += [_sum_and_count(x, mask.sum()) for x, mask in tokens]
    rows.append(_sum_and_count(attention_mask, 1))
    return torch.stack(rows)


def _sum_and_count(x: Tensor, count: Tensor | int) -> Tensor:
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
    return torch.stack([x.sum(dtype=wide), torch.as_tensor(count, dtype=wide, device=x.device)])


def over_processes(sums: Tensor, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Means by name (``num_tokens``: the sum) over all processes, in one gather. Nothing counted gives 0, as in TRL."""
    total = gather(sums[None]).sum(0).tolist()
    means = {name: value / count if count else 0.0 for name, (value, count) in zip(NAMES, total, strict=True)}
    return means | {TOKENS_SEEN: total[-1][0]}
