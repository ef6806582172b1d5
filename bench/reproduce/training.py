"""One run: a copy of the checkpoint, trained by the demo's loop, measured on the way."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from random import Random

import models
import torch
from pairs import collate, draw
from tdpo_loop import tdpo_loss, train

from ..conditions import Conditions
from .measure import measure
from .published import published_loss
from .settings import METHODS, PUBLISHED, Run, Settings
from .store import Record
from .world import World


def trained(run: Run, settings: Settings, world: World, conditions: Conditions, tick: Callable[[int], None]) -> Record:
    """`tick` is told of every step."""
    began = time.monotonic()
    policy = copy.deepcopy(world.model).to(getattr(torch, run.dtype))
    reference = copy.deepcopy(policy)
    options = METHODS[run.method] | {"beta": settings.beta}
    batches = draw(world.training[run.seed], settings.batch, settings.steps, Random(run.seed))
    collated = (collate(some, models.pad_id(world.tokenizer), policy.device) for some in batches)
    loss = published_loss if run.loss == PUBLISHED else partial(tdpo_loss, backend=run.loss)
    at = settings.measured_at if run.part != "parity" else []

    def look(step: int) -> list:
        return [measure(policy, reference, world, step, settings.batch, run.seed, **options)] if step in at else []

    points, losses = look(0), []
    for step, out in enumerate(train(policy, reference, collated, lr=run.lr, loss=loss, **options), 1):
        losses.append(float(out.loss.detach()))
        points += look(step)
        tick(1)
    return Record(run, settings.as_json(), world.checkpoint, policy.num_parameters(), conditions,
                  time.monotonic() - began, points, losses)  # fmt: skip
