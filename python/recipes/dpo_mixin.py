"""Compute the TDPO loss of a batch in a DPO trainer, and read its options from a framework's: the recipes share this.

Copy this file next to the recipe that uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.utils import is_peft_model
from tdpo_trainer import reference
from tdpo_trainer.forward import Reference, pair_outputs
from tdpo_trainer.head import check_head
from tdpo_trainer.metrics import TOKENS_SEEN, over_processes
from tdpo_trainer.parallelism import check_parallelism
from tdpo_trainer.step import IGNORED, Batch, LossOptions, pair_loss
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


class TDPOMixin:
    """To be put before a framework's DPO trainer, which then calls `start_tdpo` once it is made.

    Logged are the names of `tdpo_trainer.metrics` but the number of tokens; rewards include the KL, as in the paper.
    """

    def start_tdpo(self, options: LossOptions) -> None:
        """Says what the run does. Raises ValueError where it cannot be right, naming the option."""
        policy = self.accelerator.unwrap_model(self.model)
        if self.ref_model is None and not is_peft_model(policy):
            raise ValueError("ref_model: got None, wanted a reference model: only a PEFT model is its own")
        if self.ref_model is None:
            reference.check_own_reference(policy)
        check_parallelism(getattr(self.accelerator, "parallelism_config", None), self.model, self.ref_model)
        self.tdpo, self._heads_checked = options, False
        self.accelerator.print(options.describe(self.accelerator.device), flush=True)

    def tdpo_loss(self, model: nn.Module, inputs: Batch, pairs: Batch) -> tuple[Tensor, dict[str, float]]:
        """The mean over the pairs of a batch, and what is logged of it, over all processes.

        Args:
            inputs: what the model is called with, ``(2P, L)``, the P chosen rows first.
            pairs: as `tdpo_trainer.step.pair_loss` takes them.
        """
        policy = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            self._check_heads(model, inputs)
            theirs = self._reference_side(model, policy, inputs)
            out = pair_outputs(model, theirs, inputs, pair_loss(pairs, self.tdpo), unwrapped=policy)
        means = over_processes(out["sums"], self.accelerator.gather)
        return out["loss"], {name: value for name, value in means.items() if name != TOKENS_SEEN}

    def _reference_side(self, model: nn.Module, policy: nn.Module, inputs: Batch) -> Reference:
        if self.ref_model is None:
            return reference.from_adapter(model, policy, inputs)
        return reference.from_model(self.ref_model, self.accelerator.unwrap_model(self.ref_model), inputs)

    def _check_heads(self, model: nn.Module, inputs: Batch) -> None:
        """Once, on the first batch: that the models' logits are what the loss takes them for."""
        models = [x for x in (model, self.ref_model) if x is not None]  # a compiled one has no truth
        for wrapped in [] if self._heads_checked else models:
            check_head(self.accelerator.unwrap_model(wrapped), inputs, wrapped=wrapped)
        self._heads_checked = True


class LabelledTDPOMixin(TDPOMixin):
    """Put TDPO into trainers with a hook that TRL once had, and that ms-swift and LLaMA-Factory have kept.

    Their batch has ``labels``, aligned with the inputs, -100 outside of completions.
    """

    not_model_inputs = frozenset({"labels"})

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: Batch, train_eval: str = "train", **unused: Any
    ) -> tuple[Tensor, dict[str, float]]:
        inputs = {name: x for name, x in batch.items() if name not in self.not_model_inputs}
        labels = batch["labels"]
        pairs = {"input_ids": labels, "completion_mask": labels != IGNORED, "attention_mask": batch["attention_mask"]}
        loss, means = self.tdpo_loss(model, inputs, pairs)
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, {f"{prefix}{name}": value for name, value in means.items()}
