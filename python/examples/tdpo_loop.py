"""TDPO in a plain PyTorch loop: copy this file. What it asks of a batch is in `pairs.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from pairs import Batch
from tdpo_trainer.head import last_hidden, lm_head
from torch import nn

from tdpo_kernels import TDPOOutput, fused_tdpo_loss


def tdpo_loss(policy: nn.Module, reference: nn.Module, batch: Batch, **options) -> TDPOOutput:
    """Both models run up to their last hidden state; the loss takes it from there, so no logits are ever made."""
    hidden = last_hidden(policy, **batch.inputs)
    with torch.no_grad():
        ref_hidden = last_hidden(reference, **batch.inputs)
    return fused_tdpo_loss(hidden, lm_head(policy), ref_hidden, lm_head(reference), batch.labels, **options)


def train(
    policy: nn.Module,
    reference: nn.Module,
    batches: Iterable[Batch],
    *,
    lr: float,
    max_norm: float = 1.0,
    loss: Callable[..., TDPOOutput] = tdpo_loss,
    **options,
) -> Iterator[TDPOOutput]:
    """One optimiser step per batch. `options` go to `fused_tdpo_loss`: beta, alpha, variant, backend.

    Dropout stays off: the reward is a ratio to the reference, and noise in it is noise in the reward.
    """
    policy.eval()
    reference.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    for batch in batches:
        out = loss(policy, reference, batch, **options)
        optimizer.zero_grad()
        out.loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
        optimizer.step()
        yield out


@dataclass(frozen=True)
class Metrics:
    """Means over pairs. SeqKL is the sum of the token KLs of a completion, in nats."""

    loss: float
    accuracy: float
    chosen_kl: float
    rejected_kl: float


def metrics(outs: Iterable[TDPOOutput]) -> Metrics:
    """Over the pairs of several outputs. Equal rewards, as before any training, count as half right."""
    outs = list(outs)
    sizes = torch.tensor([out.chosen_kl.numel() for out in outs], dtype=torch.float64)
    losses = torch.tensor([float(out.loss.detach()) for out in outs], dtype=torch.float64)
    margin = torch.cat([out.chosen_rewards - out.rejected_rewards for out in outs])
    return Metrics(
        loss=float((losses * sizes).sum() / sizes.sum()),
        accuracy=float(((margin > 0) + 0.5 * (margin == 0)).mean()),
        chosen_kl=float(torch.cat([out.chosen_kl for out in outs]).mean()),
        rejected_kl=float(torch.cat([out.rejected_kl for out in outs]).mean()),
    )


@torch.no_grad()
def evaluate(policy: nn.Module, reference: nn.Module, batches: Iterable[Batch], **options) -> Metrics:
    return metrics(tdpo_loss(policy, reference, batch, **options) for batch in batches)
