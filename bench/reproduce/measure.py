"""A look at a policy on held-out prompts: what it writes, how far it went, and how it ranks pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import models
import reviews
import torch
from pairs import Ids, collate, collate_rows
from tdpo_loop import metrics, tdpo_loss
from tdpo_trainer.head import last_hidden, lm_head
from torch import nn

from tdpo_kernels import TokenStats, token_stats

from .store import Point
from .world import World

ROWS = 128  # in one forward pass


@torch.no_grad()
def measure(policy: nn.Module, reference: nn.Module, world: World, step: int, batch: int, seed: int, **loss) -> Point:
    """`loss` are the options of the run's loss. Every look of a seed draws from the same random numbers."""
    torch.manual_seed(seed)
    samples = models.sample(policy, world.tokenizer, world.probe, world.longest)
    texts = [world.tokenizer.decode(ids, skip_special_tokens=True) for ids in samples]
    return Point(
        step=step, examples=step * batch, reward=reviews.mean_sentiment(texts),
        **_of_samples(policy, reference, world, samples), **_of_pairs(policy, reference, world, **loss),
        **{f"distinct_{n}": distinct(samples, n) for n in (1, 2, 3)},
    )  # fmt: skip


def distinct(samples: Sequence[Ids], n: int) -> float:
    """Distinct n-grams as a share of all n-grams of all samples (Li et al. 2016)."""
    grams = [ids[i : i + n] for ids in samples for i in range(len(ids) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def _of_samples(policy: nn.Module, reference: nn.Module, world: World, samples: Sequence[Ids]) -> dict[str, float]:
    log_ratio = entropy = 0.0
    for stats in _statistics(policy, reference, world, samples):
        log_ratio += float((stats.logp - stats.ref_logp).double().sum())
        entropy += float(stats.extras["entropy"].double().sum())
    return {"kl": log_ratio / len(samples), "entropy": entropy / sum(map(len, samples))}


def _statistics(policy: nn.Module, reference: nn.Module, world: World, samples: Sequence[Ids]) -> Iterator[TokenStats]:
    rows = list(zip(world.probe, samples, strict=True))
    for start in range(0, len(rows), ROWS):
        batch = collate_rows(rows[start : start + ROWS], models.pad_id(world.tokenizer), policy.device)
        sides = [(last_hidden(model, **batch.inputs), lm_head(model)) for model in (policy, reference)]
        yield token_stats(*sides[0], *sides[1], batch.labels, extras=("entropy",))


def _of_pairs(policy: nn.Module, reference: nn.Module, world: World, **loss) -> dict[str, float]:
    pad, pairs = models.pad_id(world.tokenizer), world.held_out
    lots = (pairs[start : start + ROWS // 2] for start in range(0, len(pairs), ROWS // 2))
    outs = [tdpo_loss(policy, reference, collate(lot, pad, policy.device), **loss) for lot in lots]
    without = torch.cat([(o.chosen_logps - o.ref_chosen_logps) - (o.rejected_logps - o.ref_rejected_logps)
                         for o in outs])  # fmt: skip
    ranked = ((without > 0) + 0.5 * (without == 0)).mean()
    return vars(metrics(outs)) | {"accuracy_without_kl": float(ranked)}
