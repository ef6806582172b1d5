"""TDPO on the bare `transformers.Trainer`, for those without TRL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from . import reference
from .forward import Reference, pair_outputs
from .head import check_head
from .metrics import TOKENS_SEEN, means_of, total_over_processes
from .parallelism import check_parallelism, copies_of_a_batch, keep_pairs_together, pairs_that_count
from .redirect import refuse_compiled
from .step import (
    Batch,
    LossOptions,
    aux_loss_of,
    model_inputs,
    pair_loss,
    refuse_functions_of_logits,
    refuse_torch_compile,
)
from .tokens import token_rows


class PlainTDPOTrainer(Trainer):
    """`transformers.Trainer` with the TDPO loss, the mean over the pairs of a micro-batch.

    Args:
        model: a causal LM, or a PEFT model of one.
        ref_model: another instance of it, not trained. None: the model under its PEFT adapter.
        args: `transformers.TrainingArguments`. ``remove_unused_columns`` is set to False.
        options: beta, alpha, variant, backend, memory_budget.
        train_dataset, eval_dataset: rows of ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, as `tokenize` makes them.
        max_length: of prompt and completion together; what is longer loses its end.
        router_aux_loss_coef: the weight of a mixture of experts' auxiliary loss; None: its config's own.
        kwargs: the other arguments of `transformers.Trainer`; ``processing_class`` is needed.

    Logged are the names of `metrics`: rewards are the paper's and include the KL.

    Raises:
        TypeError, ValueError: naming the argument, what was seen and what is wanted.
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None = None,
        args: Any = None,
        *,
        options: LossOptions | None = None,
        max_length: int | None = 1024,
        router_aux_loss_coef: float | None = None,
        **kwargs: Any,
    ) -> None:
        if ref_model is model:
            raise ValueError(
                "ref_model: got the model itself, wanted another instance (copy.deepcopy), or None with PEFT"
            )
        if ref_model is None and not is_peft_model(model):
            raise ValueError("ref_model: got None, wanted a model: only a PEFT model is its own reference")
        refuse_compiled(*(x for x in (model, ref_model) if x is not None))
        if ref_model is None:
            reference.check_own_reference(model)
        _refuse_what_has_no_effect(args, kwargs)
        tokenizer = kwargs.get("processing_class")
        if getattr(tokenizer, "pad_token_id", None) is None:
            raise ValueError(f"processing_class: got {type(tokenizer).__name__}, wanted a tokenizer with a pad token")
        args = TrainingArguments("tmp_trainer") if args is None else args  # transformers' own default
        args.remove_unused_columns = False
        kwargs.setdefault("data_collator", partial(collate, pad=tokenizer.pad_token_id, max_length=max_length))
        super().__init__(model=model, args=args, **kwargs)
        check_parallelism(self.accelerator.parallelism_config, model, ref_model)
        keep_pairs_together(self.accelerator)
        self.options = options or LossOptions()
        self.model_accepts_loss_kwargs = False  # so that the loss is divided by gradient_accumulation_steps
        self.ref_model = ref_model
        if ref_model is not None:
            ref_model.requires_grad_(False).eval()
            self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        self.router_aux_loss_coef = _router_aux_loss_coef(model, router_aux_loss_coef)
        self._totals: dict[str, Tensor] = {}
        self._aux_losses: dict[str, list[float]] = {"train": [], "eval": []}
        self._heads_checked = False
        self._tokens_seen = 0
        self.accelerator.print(self.options.describe(self.accelerator.device), flush=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        policy = self.accelerator.unwrap_model(model)
        router = {"output_router_logits": True} if self.router_aux_loss_coef else {}
        with self.accelerator.autocast():
            self._check_heads(model, inputs)
            theirs = self._reference_side(model, policy, inputs)
            loss = pair_loss(inputs, self.options)
            out = pair_outputs(model, theirs, model_inputs(inputs) | router, loss, unwrapped=policy)
        self._record(mode, out["sums"])
        total = out["loss"] + self._aux_loss(mode, out) if router else out["loss"]
        return (total, out) if return_outputs else total

    def _aux_loss(self, mode: str, out: dict[str, Tensor]) -> Tensor:
        """Noted, and times its coefficient."""
        loss = aux_loss_of(out)
        self._aux_losses[mode].append(self.accelerator.gather(loss.detach()).mean().item())
        return self.router_aux_loss_coef * loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss only: there are no logits to return."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to `logs` itself, as TRL does: `evaluate` returns it, and ``metric_for_best_model`` finds it."""
        mode = "train" if self.model.training else "eval"
        prefix = "eval_" if mode == "eval" else ""
        means = means_of(self._totals.pop(mode)) if mode in self._totals else {}
        if aux := self._aux_losses[mode]:
            means["aux_loss"] = sum(aux) / len(aux)
            aux.clear()
        means = {f"{prefix}{name}": value for name, value in (means | {TOKENS_SEEN: self._tokens_seen}).items()}
        logs.update(means)
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Without what an earlier `predict` left unlogged."""
        self._totals.pop("eval", None)
        self._aux_losses["eval"].clear()
        return super().evaluation_loop(*args, **kwargs)

    def _reference_side(self, model: nn.Module, policy: nn.Module, inputs: Batch) -> Reference:
        if self.ref_model is None:
            return reference.from_adapter(model, policy, inputs)
        return reference.from_model(self.ref_model, self.accelerator.unwrap_model(self.ref_model), inputs)

    def _check_heads(self, model: nn.Module, inputs: Batch) -> None:
        """Once, on the first batch: that the models' logits are what the loss takes them for."""
        models = [x for x in (model, self.ref_model) if x is not None]  # a compiled one has no truth
        for wrapped in [] if self._heads_checked else models:
            check_head(self.accelerator.unwrap_model(wrapped), model_inputs(inputs), wrapped=wrapped)
        self._heads_checked = True

    def _record(self, mode: str, sums: Tensor) -> None:
        copies = copies_of_a_batch(self.accelerator.parallelism_config, self.model)
        counted = len(sums) if mode == "train" else pairs_that_count(self.accelerator, len(sums), copies)
        total = total_over_processes(sums[:counted], self.accelerator.gather)
        if mode == "train":
            self._tokens_seen += int(means_of(total)[TOKENS_SEEN]) // copies
        self._totals[mode] = self._totals.get(mode, 0) + total


def _router_aux_loss_coef(model: nn.Module, given: float | None) -> float:
    config = model.config.get_text_config()
    makes_one = hasattr(config, "output_router_logits")
    if given and not makes_one:
        raise ValueError(f"router_aux_loss_coef: got {given:g} for a {config.model_type}, which has no auxiliary loss")
    return given if given is not None else getattr(config, "router_aux_loss_coef", 0.0) if makes_one else 0.0


def _refuse_what_has_no_effect(args: Any, others: Mapping[str, Any]) -> None:
    refuse_functions_of_logits(others)
    refuse_torch_compile(args)
    if seen := getattr(args, "label_smoothing_factor", 0.0):
        raise ValueError(f"label_smoothing_factor: got {seen:g}, wanted 0.0: TDPO's loss has none")


def tokenize(
    tokenizer: PreTrainedTokenizerBase, pairs: Iterable[Mapping[str, str]], max_length: int | None = None
) -> list[dict[str, list[int]]]:
    """Return rows of token ids from rows of text under ``prompt``, ``chosen``, ``rejected``; completions end with EOS.

    They are the ids that TRL makes. Pairs whose prompt fills `max_length` are left out, and counted in a printed line.
    """
    return token_rows(tokenizer, pairs, max_length)


def collate(rows: Sequence[Mapping[str, list[int]]], *, pad: int, max_length: int | None) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask``, ``completion_mask``: ``(2P, L)`` int64, padded on the right, chosen first."""
    pairs = [(row["prompt_ids"], row[name]) for name in ("chosen_ids", "rejected_ids") for row in rows]
    length = max(len(prompt) + len(completion) for prompt, completion in pairs)
    ids = torch.full((len(pairs), length), pad)
    attention, completion_mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (prompt, completion) in enumerate(pairs):
        end = len(prompt) + len(completion)
        ids[i, :end] = torch.tensor([*prompt, *completion])
        attention[i, :end] = 1
        completion_mask[i, len(prompt) : end] = 1
    cut = slice(None, max_length)
    return {"input_ids": ids[:, cut], "attention_mask": attention[:, cut], "completion_mask": completion_mask[:, cut]}
