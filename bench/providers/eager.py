"""The published TDPO formula: full logits of both models, autograd. What people run today."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import IGNORE, Problem
from ..shapes import Shape
from .provider import Provider, Step, anywhere, preference

COPIES = 6  # of fp32 [tokens, vocabulary] that it holds at its peak


def statistics(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Per sequence, over the tokens that count: log-probability margin and KL. As published, in fp32 (float64 stays),
    but for log_softmax in place of softmax().log(), which underflows."""
    mask = labels != IGNORE
    pick = labels.where(mask, 0)[..., None]
    with torch.no_grad():
        ref_logits = _logits(ref_hidden, ref_weight, softcap)
        ref_probs, ref_logp = ref_logits.softmax(-1), ref_logits.log_softmax(-1)
    logp = _logits(hidden, weight, softcap).log_softmax(-1)
    kl_S = ((ref_probs * (ref_logp - logp)).sum(-1) * mask).sum(-1)
    margin_S = ((logp.gather(-1, pick) - ref_logp.gather(-1, pick))[..., 0] * mask).sum(-1)
    return margin_S, kl_S


def _logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    z = hidden @ weight.T
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def tdpo2(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    labels: Tensor,
    softcap: float | None = None,
) -> Tensor:
    return preference(*statistics(hidden, weight, ref_hidden, ref_weight, labels, softcap))


def dpo(problem: Problem) -> Tensor:
    """What is left without the KL: the truth for those who compute no more."""
    return preference(statistics(*tensors(problem))[0], None)


def kl(problem: Problem) -> Tensor:
    return statistics(*tensors(problem))[1]


def tensors(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float | None]:
    return p.hidden, p.weight, p.ref_hidden, p.ref_weight, p.labels, p.softcap


def needs(shape: Shape) -> int:
    return COPIES * 4 * shape.T * shape.V


PROVIDER = Provider("tdpo2", anywhere, lambda p: Step(lambda: tdpo2(*tensors(p))), kl, needs)
