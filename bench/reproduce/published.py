"""The published formula: logits of the whole vocabulary from both models, and autograd. Written after eqs. (9), (10) of
arXiv 2404.11999 and apart from this library, to compare with; log_softmax in place of softmax().log(), which
underflows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pairs import IGNORED, Batch
from torch import nn

from tdpo_kernels import TDPOOutput


def published_loss(
    policy: nn.Module, reference: nn.Module, batch: Batch, *, beta: float, alpha: float | None, variant: str
) -> TDPOOutput:
    """Has the signature of the demo's `tdpo_loss`."""
    logp = _log_probabilities(policy, batch)
    with torch.no_grad():
        ref_logp = _log_probabilities(reference, batch)
    labels = batch.labels[:, 1:]
    mask = labels != IGNORED
    pick = labels.where(mask, 0)[..., None]
    kl_S = ((ref_logp.exp() * (ref_logp - logp)).sum(-1) * mask).sum(-1)
    logps_S, ref_logps_S = (((x.gather(-1, pick)[..., 0]) * mask).sum(-1) for x in (logp, ref_logp))

    (m_w, m_l), (k_w, k_l) = (logps_S - ref_logps_S).chunk(2), kl_S.chunk(2)
    difference = k_l - k_w if variant == "tdpo1" else alpha * (k_l - k_w.detach())
    loss = -F.logsigmoid(beta * ((m_w - m_l) - difference)).mean()
    rewards_S = beta * (logps_S - ref_logps_S + kl_S)
    halves = (half.detach() for x in (logps_S, ref_logps_S, kl_S, rewards_S) for half in x.chunk(2))
    return TDPOOutput(loss, *halves)


def _log_probabilities(model: nn.Module, batch: Batch) -> torch.Tensor:
    """``(2P, L - 1, V)``"""
    return model(**batch.inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
