"""Read TDPO's options from a framework's, and put its loss where DPO trainers had theirs: the recipes share this.

Copy this file next to the recipe that uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tdpo_trainer.mixin import TDPOMixin
from tdpo_trainer.step import IGNORED, Batch, LossOptions
from torch import Tensor, nn

PREFIX = "tdpo_"
SETTINGS = {"alpha": float, "variant": str, "backend": str, "memory_budget": int}


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings whose names begin with `PREFIX`, without it."""
    given = {name: value for name, value in config.items() if name.startswith(PREFIX) and value is not None}
    return {name.removeprefix(PREFIX): value for name, value in given.items()}


def loss_options(beta: float, settings: Mapping[str, Any]) -> LossOptions:
    """Return options from a framework's beta and from `SETTINGS`, as text or as values, which it has no names for.

    Raises:
        ValueError: a setting of another name, or one that TDPO does not have.
    """
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise ValueError(f"TDPO: got a setting {unknown[0]!r}, wanted one of {', '.join(SETTINGS)}")
    return LossOptions(beta, **{name: SETTINGS[name](value) for name, value in settings.items()})


def refuse(what: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises ValueError for the first option, ``{name: (seen, wanted)}``, that is not what TDPO needs."""
    for name, (seen, wanted) in what.items():
        if seen != wanted:
            raise ValueError(f"{name}: got {seen!r}, wanted {wanted!r} with TDPO")


class LabelledTDPOMixin(TDPOMixin):
    """Put TDPO into trainers with a hook that TRL once had, and that ms-swift and LLaMA-Factory have kept.

    Their batch has ``labels``, aligned with the inputs, -100 outside of completions.
    """

    not_model_inputs = frozenset({"labels"})

    def get_batch_loss_metrics(self, model: nn.Module, batch: Batch, *_: Any, **unused: Any) -> tuple[Tensor, dict]:
        inputs = {name: x for name, x in batch.items() if name not in self.not_model_inputs}
        labels = batch["labels"]
        pairs = {"input_ids": labels, "completion_mask": labels != IGNORED, "attention_mask": batch["attention_mask"]}
        return self.tdpo_loss(model, pairs, inputs), {}
