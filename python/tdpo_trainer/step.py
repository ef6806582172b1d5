"""One micro-batch of pairs, with no trainer in it: what the model is given of it, and its TDPO loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .forward import Loss
from .kernels import LMHead, TDPOLoss, explain_backend, fused_tdpo_loss
from .metrics import EXTRAS, pair_sums

IGNORED = -100
NOT_MODEL_INPUTS = frozenset({"completion_mask", "cu_seqlens", "ref_hidden", "ref_chosen_logps", "ref_rejected_logps"})
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class LossOptions:
    """Hold options of `tdpo_kernels.fused_tdpo_loss`, checked when made."""

    beta: float = 0.1
    alpha: float | None = None
    variant: str = "tdpo2"
    backend: str = "auto"
    memory_budget: int = 2**30
    sft_weight: float = 0.0
    length_normalized: bool = False

    def __post_init__(self) -> None:
        TDPOLoss(**vars(self))

    @property
    def alpha_used(self) -> float | None:
        """The weight of TDPO2's KL difference, its default where none was given; None for TDPO1, which has none."""
        return None if self.variant == "tdpo1" else 0.5 if self.alpha is None else self.alpha

    def describe(self, device: torch.device) -> str:
        """The first line of a run. Raises ValueError where the backend does not run on `device`."""
        alpha = "none" if self.alpha_used is None else f"{self.alpha_used:g}"
        backend = explain_backend(self.backend, device)
        terms = f", sft_weight {self.sft_weight:g}" if self.sft_weight else ""
        terms += ", means over tokens" if self.length_normalized else ""
        return f"TDPO: variant {self.variant}, alpha {alpha}, beta {self.beta:g}{terms}, backend {backend}"


def model_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return what the model is called with: all that is not there for the loss alone."""
    return {name: x for name, x in batch.items() if name not in NOT_MODEL_INPUTS}


def labels_of(batch: Batch) -> Tensor:
    """``(2P, L)`` int64: the inputs, -100 outside of completions; not shifted."""
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)


def pair_loss(batch: Batch, options: LossOptions) -> Loss:
    """The loss `forward.pair_outputs` wants for this batch.

    Args:
        batch: ``input_ids``, ``attention_mask``, ``completion_mask``, all ``(2P, L)``, the P chosen rows first; or one
            row of them as `packed.packed` makes it.

    Returns:
        A function of ``(hidden, head, ref_hidden, ref_head)`` to ``loss``, a scalar, the mean over the P pairs, and
        ``sums``, those of `metrics.pair_sums`, detached.
    """
    labels, offsets = labels_of(batch), batch.get("cu_seqlens")
    lengths = batch["attention_mask"].sum(-1) if offsets is None else offsets.diff()
    labels = labels if offsets is None else labels[0]

    def loss(hidden: Tensor, head: LMHead, ref_hidden: Tensor, ref_head: LMHead) -> dict[str, Tensor]:
        each = "mean" if torch.is_grad_enabled() else "none"  # in evaluation a pair may be one that does not count
        ours, theirs = (x if offsets is None else x[0] for x in (hidden, ref_hidden))
        out = fused_tdpo_loss(
            ours, head, theirs, ref_head, labels, ignore_index=IGNORED, extras=EXTRAS, reduction=each,
            cu_seqlens=offsets, **vars(options),
        )  # fmt: skip
        return {"loss": out.loss.mean(), "sums": pair_sums(out, out.tokens, labels != IGNORED, lengths, offsets)}

    return loss


def aux_loss_of(out: Mapping[str, Tensor]) -> Tensor:
    """Return the loss that keeps a mixture's experts evenly used. Raises ValueError if the model gave none."""
    if "aux_loss" not in out:
        raise ValueError("router_aux_loss_coef: the model gave no auxiliary loss, wanted 0.0 for such a model")
    return out["aux_loss"]


def refuse_functions_of_logits(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for a trainer's argument that would be called with logits, or in place of the loss."""
    for name, what in (
        ("compute_metrics", "a function of logits"), ("preprocess_logits_for_metrics", "a function of logits"),
        ("compute_loss_func", "a loss of logits"),
    ):  # fmt: skip
        if arguments.get(name) is not None:
            raise ValueError(f"{name}: got {what}, wanted None: TDPO never makes them")


def datasets_of(arguments: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return a trainer's datasets, each with its argument's name; several to evaluate on one by one."""
    evaluated = arguments.get("eval_dataset")
    evaluated = list(evaluated.values()) if isinstance(evaluated, dict) else [evaluated]
    return [("train_dataset", arguments.get("train_dataset")), *(("eval_dataset", x) for x in evaluated)]


def refuse_torch_compile(args: Any) -> None:
    """Raises ValueError for ``torch_compile`` in a trainer's arguments, which compiles the model as a whole."""
    if getattr(args, "torch_compile", False):
        raise ValueError(
            "torch_compile: got True, wanted False: compiled as a whole, a model cannot be cut at its head; its parts "
            "can be: model.model.compile(), or layer.compile() of each layer"
        )
