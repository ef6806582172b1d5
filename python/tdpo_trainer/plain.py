"""TDPO on the bare `transformers.Trainer`, for those without TRL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from .mixin import TDPOMixin
from .record import Record
from .redirect import refuse_compiled
from .step import LossOptions, datasets_of, refuse_functions_of_logits, refuse_torch_compile

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class PlainTDPOTrainer(TDPOMixin, Trainer):
    """`transformers.Trainer` with the TDPO loss, the mean over the pairs of a micro-batch.

    Args:
        model: a causal LM, or a PEFT model of one.
        ref_model: another instance of it, not trained. None: the model under its PEFT adapter.
        args: `transformers.TrainingArguments`. ``remove_unused_columns`` is set to False.
        options: beta, alpha, variant, backend, memory_budget.
        train_dataset, eval_dataset: rows of ``prompt_ids``, ``chosen_ids``, ``rejected_ids``, as `tokenize` makes them.
        max_length: of prompt and completion together; what is longer loses its end.
        padding_free: the model gets one row of tokens without padding, where its attention keeps sequences apart.
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
        padding_free: bool = False,
        router_aux_loss_coef: float | None = None,
        **kwargs: Any,
    ) -> None:
        if ref_model is model:
            raise ValueError(
                "ref_model: got the model itself, wanted another instance (copy.deepcopy), or None with PEFT"
            )
        refuse_compiled(*(x for x in (model, ref_model) if x is not None))
        _refuse_what_has_no_effect(args, kwargs)
        tokenizer = kwargs.get("processing_class")
        if getattr(tokenizer, "pad_token_id", None) is None:
            raise ValueError(f"processing_class: got {type(tokenizer).__name__}, wanted a tokenizer with a pad token")
        args = TrainingArguments("tmp_trainer") if args is None else args  # transformers' own default
        args.remove_unused_columns = False
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = partial(collate, pad=tokenizer.pad_token_id, max_length=max_length)
            _check_rows(kwargs, max_length)
        self.begin(options or LossOptions(), args, padding_free)
        self.ref_model = ref_model
        super().__init__(model=model, args=args, **kwargs)
        self.check_models(max_length)
        self.add_callback(Record(self.loss_options, self.train_dataset))
        self.model_accepts_loss_kwargs = False  # so that the loss is divided by gradient_accumulation_steps
        if ref_model is not None:
            ref_model.requires_grad_(False).eval()
            self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        self.router_aux_loss_coef = _router_aux_loss_coef(model, router_aux_loss_coef)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = self.tdpo_loss(model, inputs, aux_weight=self.router_aux_loss_coef)
        return (loss, {"loss": loss}) if return_outputs else loss


def _router_aux_loss_coef(model: nn.Module, given: float | None) -> float:
    config = model.config.get_text_config()
    makes_one = hasattr(config, "output_router_logits")
    if given and not makes_one:
        raise ValueError(f"router_aux_loss_coef: got {given:g} for a {config.model_type}, which has no auxiliary loss")
    return given if given is not None else getattr(config, "router_aux_loss_coef", 0.0) if makes_one else 0.0


def _check_rows(kwargs: Mapping[str, Any], max_length: int | None) -> None:
    """Raise ValueError for rows that are not `tokenize`'s, where they can be looked at, and for those without room.

    A prompt that fills `max_length` leaves no completion to learn from: `tokenize` leaves such pairs out.
    """
    for name, rows in datasets_of(kwargs):
        if not hasattr(rows, "__getitem__") or not len(rows):
            continue
        if not set(COLUMNS) <= set(rows[0]):
            got, wanted = ", ".join(rows[0]), ", ".join(COLUMNS)
            raise ValueError(f"{name}: got rows of {got}; wanted {wanted}, as tokens.tokenize makes them")
        filled = sum(max_length is not None and len(row["prompt_ids"]) >= max_length for row in rows)
        if filled:
            raise ValueError(
                f"{name}: got {filled} of {len(rows)} pairs with a prompt that fills max_length={max_length}, wanted "
                "none: tokens.tokenize(..., max_length) leaves them out"
            )


def _refuse_what_has_no_effect(args: Any, others: Mapping[str, Any]) -> None:
    refuse_functions_of_logits(others)
    refuse_torch_compile(args)
    if seen := getattr(args, "label_smoothing_factor", 0.0):
        raise ValueError(f"label_smoothing_factor: got {seen:g}, wanted 0.0: TDPO's loss has none")


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
