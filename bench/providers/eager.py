"""The published TDPO formula: full logits of both models, autograd. What people run today."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import ALPHA, BETA, Problem


def tdpo2(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor) -> Tensor:
    """As published, in fp32 (float64 stays), but for log_softmax in place of softmax().log(), which underflows."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    with torch.no_grad():
        ref_logits = (ref_hidden @ ref_weight.T).to(wide)
        ref_probs, ref_logp = ref_logits.softmax(-1), ref_logits.log_softmax(-1)
    logp = (hidden @ weight.T).to(wide).log_softmax(-1)
    kl_S = (ref_probs * (ref_logp - logp)).sum(-1).sum(-1)
    pick = labels[..., None]
    margin_S = (logp.gather(-1, pick) - ref_logp.gather(-1, pick))[..., 0].sum(-1)
    (m_w, m_l), (k_w, k_l) = margin_S.chunk(2), kl_S.chunk(2)
    return -F.logsigmoid(BETA * (m_w - m_l - ALPHA * (k_l - k_w.detach()))).mean()


class Eager:
    name = "eager"

    def available(self) -> str | None:
        return None

    def make(self, problem: Problem) -> Callable[[], Tensor]:
        def step() -> Tensor:
            loss = tdpo2(problem.hidden, problem.weight, problem.ref_hidden, problem.ref_weight, problem.labels)
            loss.backward()
            return loss.detach()

        return step
