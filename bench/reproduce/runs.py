"""Make the world that all runs start from, train a run in it with the demo's loop, and measure it on the way."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace

import models
import reviews
import torch
import torch.nn.functional as F
from pairs import Batch, Ids, Pair, collate, collate_rows, completion_ids, draw, prompt_ids
from sentiment import Study, sample_pairs
from tdpo_loop import metrics, tdpo_loss, train
from tdpo_trainer.head import last_hidden, lm_head
from torch import nn

from tdpo_kernels import token_stats

from ..conditions import Conditions
from ..providers.eager import statistics
from .settings import METHODS, PUBLISHED, Run, Settings
from .store import Mixed, Point, Record, write_atomically

ROWS = 128  # in one forward pass of a measurement
Tick = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class World:
    """A model fine-tuned on generated reviews, and pairs of its own samples, ranked by the known reward.

    `training` has the pairs of each seed. Prompts of `probe` and `held_out` are in nothing that was trained on.
    """

    model: nn.Module
    tokenizer: object
    training: dict[int, list[Pair]]
    held_out: list[Pair]
    probe: list[Ids]
    longest: int  # tokens a sampled completion may have

    @property
    def checkpoint(self) -> str:
        """Return a digest of the weights and the pairs: runs of different checkpoints never meet."""
        digest = hashlib.sha256(repr((self.training, self.held_out, self.probe)).encode())
        for name, value in self.model.state_dict().items():
            digest.update(name.encode() + value.cpu().numpy().tobytes())
        return digest.hexdigest()[:12]


def world(settings: Settings, folder: Path, device: torch.device, tick: Tick) -> World:
    """Return the one kept in `folder`, or make one and keep it there."""
    torch.manual_seed(0)
    rng = Random(0)
    texts, seen, unseen = reviews.corpus(rng, settings.reviews)
    tokenizer = models.small_tokenizer(prompt + text for prompt, text in texts)
    model = models.small_model(tokenizer, 64, settings.width, settings.layers).to(device)
    rows = [(prompt_ids(tokenizer, prompt), completion_ids(tokenizer, text)) for prompt, text in texts]
    probe = [prompt_ids(tokenizer, unseen[i % len(unseen)]) for i in range(settings.samples)]
    longest = max(len(completion) for _, completion in rows) + 4
    kept = folder / "world.pt"
    if kept.exists():
        tick(settings.sft_steps)
        there = torch.load(kept, map_location=device, weights_only=False)
        if there["settings"] != settings.as_json():
            raise Mixed(kept, there["settings"], settings.as_json())
        model.load_state_dict(there["model"])
        return World(model, tokenizer, there["training"], there["held_out"], probe, longest)
    steps, pad = settings.sft_steps, models.pad_id(tokenizer)
    batches = (collate_rows(some, pad, device) for some in draw(rows, 2 * settings.batch, steps, rng))
    for _ in models.fine_tune(model, batches, steps, settings.sft_lr):
        tick(1)
    study = Study(model, tokenizer, [], [], [], longest)
    seen, unseen = ([prompt_ids(tokenizer, prompt) for prompt in some] for some in (seen, unseen))
    training = {seed: list(sample_pairs(study, seen, settings.pairs, rng)) for seed in settings.seeds}
    held_out = list(sample_pairs(study, unseen, settings.held_out, rng))
    made = dict(settings=settings.as_json(), model=model.state_dict(), training=training, held_out=held_out)
    write_atomically(kept, lambda file: torch.save(made, file))
    return World(model, tokenizer, training, held_out, probe, longest)


def trained(run: Run, settings: Settings, world: World, conditions: Conditions, tick: Tick) -> Record:
    """Train a copy of the checkpoint. `tick` is told of every step."""
    began = time.monotonic()
    policy = copy.deepcopy(world.model).to(getattr(torch, run.dtype))
    reference = copy.deepcopy(policy)
    options = METHODS[run.method] | {"beta": settings.beta}
    batches = draw(world.training[run.seed], settings.batch, settings.steps, Random(run.seed))
    collated = (collate(some, models.pad_id(world.tokenizer), policy.device) for some in batches)
    loss = published_loss if run.loss == PUBLISHED else partial(tdpo_loss, backend=run.loss)
    at = settings.measured_at if run.part != "parity" else []

    def look(step: int) -> list[Point]:
        return [measure(policy, reference, world, step, settings.batch, run.seed, **options)] if step in at else []

    points, losses = look(0), []
    for step, out in enumerate(train(policy, reference, collated, lr=run.lr, loss=loss, **options), 1):
        losses.append(float(out.loss.detach()))
        points += look(step)
        tick(1)
    return Record(run, settings.as_json(), world.checkpoint, policy.num_parameters(), conditions,
                  time.monotonic() - began, points, losses)  # fmt: skip


@torch.no_grad()
def measure(policy: nn.Module, reference: nn.Module, world: World, step: int, batch: int, seed: int, **loss) -> Point:
    """Look at a policy on held-out prompts: what it writes, how far it went, and how it ranks pairs.

    `loss` are the options of the run's loss. Every look of a seed draws from the same random numbers.
    """
    torch.manual_seed(seed)
    samples = models.sample(policy, world.tokenizer, world.probe, world.longest)
    texts = [world.tokenizer.decode(ids, skip_special_tokens=True) for ids in samples]
    return Point(
        step=step, examples=step * batch, reward=reviews.mean_sentiment(texts),
        **_of_samples(policy, reference, world, samples), **_of_pairs(policy, reference, world, **loss),
        **{f"distinct_{n}": distinct(samples, n) for n in (1, 2, 3)},
    )  # fmt: skip


def distinct(samples: Sequence[Ids], n: int) -> float:
    """Return distinct n-grams as a share of all n-grams of all samples (Li et al. 2016)."""
    grams = [ids[i : i + n] for ids in samples for i in range(len(ids) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def _of_samples(policy: nn.Module, reference: nn.Module, world: World, samples: Sequence[Ids]) -> dict[str, float]:
    log_ratio, entropy, rows = 0.0, 0.0, list(zip(world.probe, samples, strict=True))
    for start in range(0, len(rows), ROWS):
        batch = collate_rows(rows[start : start + ROWS], models.pad_id(world.tokenizer), policy.device)
        sides = [(last_hidden(model, **batch.inputs), lm_head(model)) for model in (policy, reference)]
        stats = token_stats(*sides[0], *sides[1], batch.labels, extras=("entropy",))
        log_ratio += float((stats.logp - stats.ref_logp).double().sum())
        entropy += float(stats.extras["entropy"].double().sum())
    return {"kl": log_ratio / len(samples), "entropy": entropy / sum(map(len, samples))}


def _of_pairs(policy: nn.Module, reference: nn.Module, world: World, **loss) -> dict[str, float]:
    pad, pairs = models.pad_id(world.tokenizer), world.held_out
    lots = (pairs[start : start + ROWS // 2] for start in range(0, len(pairs), ROWS // 2))
    outs = [tdpo_loss(policy, reference, collate(lot, pad, policy.device), **loss) for lot in lots]
    without = torch.cat([(o.chosen_logps - o.ref_chosen_logps) - (o.rejected_logps - o.ref_rejected_logps)
                         for o in outs])  # fmt: skip
    ranked = ((without > 0) + 0.5 * (without == 0)).mean()
    return vars(metrics(outs)) | {"accuracy_without_kl": float(ranked)}


def published_loss(
    policy: nn.Module, reference: nn.Module, batch: Batch, *, beta: float, alpha: float | None, variant: str
) -> SimpleNamespace:
    """Compute eqs. (9), (10) of arXiv 2404.11999 from logits of the whole vocabulary, apart from this library.

    It has the signature of the demo's `tdpo_loss`, and returns the loss alone.
    """
    with torch.no_grad():
        there = last_hidden(reference, **batch.inputs)[:, :-1], lm_head(reference).weight
    here = last_hidden(policy, **batch.inputs)[:, :-1], lm_head(policy).weight
    margin_S, kl_S = statistics(*here, *there, batch.labels[:, 1:], None)
    (m_w, m_l), (k_w, k_l) = margin_S.chunk(2), kl_S.chunk(2)
    difference = k_l - k_w if variant == "tdpo1" else alpha * (k_l - k_w.detach())
    return SimpleNamespace(loss=-F.logsigmoid(beta * ((m_w - m_l) - difference)).mean())
