"""What all runs start from: a model fine-tuned on generated reviews, and pairs of its own samples, ranked by the known
reward. Made once, and kept beside the runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import models
import reviews
import torch
from pairs import Ids, Pair, collate_rows, completion_ids, draw, prompt_ids
from sentiment import Study, sample_pairs
from torch import nn

from .settings import Settings
from .store import Mixed, write_atomically

FILE = "world.pt"
Tick = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class World:
    """`training` has the pairs of each seed. Prompts of `probe` and `held_out` are in nothing that was trained on."""

    model: nn.Module
    tokenizer: object
    training: dict[int, list[Pair]]
    held_out: list[Pair]
    probe: list[Ids]
    longest: int  # tokens a sampled completion may have

    @property
    def checkpoint(self) -> str:
        """Of the weights and the pairs: runs of different checkpoints never meet."""
        digest = hashlib.sha256(repr((self.training, self.held_out, self.probe)).encode())
        for name, value in self.model.state_dict().items():
            digest.update(name.encode() + value.cpu().numpy().tobytes())
        return digest.hexdigest()[:12]


def ticks(settings: Settings) -> int:
    return settings.sft_steps


def world(settings: Settings, folder: Path, device: torch.device, tick: Tick) -> World:
    """The one kept in `folder`, or a new one, which is then kept there."""
    torch.manual_seed(0)
    rng = Random(0)
    texts, seen, unseen = reviews.corpus(rng, settings.reviews)
    tokenizer = models.small_tokenizer(prompt + text for prompt, text in texts)
    model = models.small_model(tokenizer, 64, settings.width, settings.layers).to(device)
    rows = [(prompt_ids(tokenizer, prompt), completion_ids(tokenizer, text)) for prompt, text in texts]
    probe = [prompt_ids(tokenizer, unseen[i % len(unseen)]) for i in range(settings.samples)]
    longest = max(len(completion) for _, completion in rows) + 4
    kept = folder / FILE
    if kept.exists():
        tick(ticks(settings))
        return _load(kept, settings, World(model, tokenizer, {}, [], probe, longest))
    _fine_tune(model, tokenizer, rows, settings, rng, tick)
    study = Study(model, tokenizer, [], [], [], longest)
    seen, unseen = ([prompt_ids(tokenizer, prompt) for prompt in some] for some in (seen, unseen))
    training = {seed: list(sample_pairs(study, seen, settings.pairs, rng)) for seed in settings.seeds}
    made = World(model, tokenizer, training, list(sample_pairs(study, unseen, settings.held_out, rng)), probe, longest)
    _save(kept, settings, made)
    return made


def _fine_tune(
    model: nn.Module, tokenizer, rows: Sequence[tuple[Ids, Ids]], settings: Settings, rng: Random, tick: Tick
) -> None:
    steps, pad = settings.sft_steps, models.pad_id(tokenizer)
    batches = (collate_rows(some, pad, model.device) for some in draw(rows, 2 * settings.batch, steps, rng))
    for _ in models.fine_tune(model, batches, steps, settings.sft_lr):
        tick(1)


def _save(path: Path, settings: Settings, made: World) -> None:
    pairs = {seed: _plain(some) for seed, some in made.training.items()}
    kept = dict(settings=settings.as_json(), model=made.model.state_dict(), training=pairs)
    write_atomically(path, lambda file: torch.save(kept | {"held_out": _plain(made.held_out)}, file))


def _load(path: Path, settings: Settings, empty: World) -> World:
    kept = torch.load(path, map_location=empty.model.device, weights_only=True)
    if kept["settings"] != settings.as_json():
        raise Mixed(path, kept["settings"], settings.as_json())
    empty.model.load_state_dict(kept["model"])
    training = {seed: [Pair(*pair) for pair in some] for seed, some in kept["training"].items()}
    held_out = [Pair(*pair) for pair in kept["held_out"]]
    return World(empty.model, empty.tokenizer, training, held_out, empty.probe, empty.longest)


def _plain(pairs: Sequence[Pair]) -> list[tuple[Ids, Ids, Ids]]:
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
