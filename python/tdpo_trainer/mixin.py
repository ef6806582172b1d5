"""Put TDPO before the methods of a `transformers.Trainer`: the trainers here and the recipes share this."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from . import reference
from .forward import Reference, pair_outputs
from .head import check_head
from .kernels import explain_way
from .metrics import TOKENS_SEEN, means_of, total_over_processes, with_aux_loss
from .packed import check_packing, packed
from .parallelism import check_parallelism, copies_of_a_batch, keep_pairs_together, pairs_that_count
from .step import Batch, LossOptions, aux_loss_of, model_inputs, pair_loss


class TDPOMixin:
    """Train with the TDPO loss in the trainer that stands behind this among a class's bases.

    The class calls `begin` and, once its models are made, `check_models`; its ``compute_loss`` calls `tdpo_loss`. Its
    ``ref_model`` is None where the reference is the policy without its adapter.

    Logged are the names of `metrics`, of each evaluation set under its own; rewards include the KL, as in the paper.
    """

    def begin(self, options: LossOptions, args: Any, padding_free: bool = False) -> None:
        """Say what the run computes, and where. Raises ValueError where the backend does not run there."""
        self.loss_options = options
        self._sums: dict[str, Tensor] = {}
        self._heads_checked, self._packs = False, padding_free
        if args.process_index == 0:
            print(options.describe(args.device), flush=True)

    def check_models(self, max_length: int | None = None) -> None:
        """Check that the trainer's models can be trained, and that the reference is what training begins with.

        Then say how the loss of a full batch of sequences of `max_length` tokens goes.

        Raises:
            ValueError: not so, naming the argument, what was seen and a way out.
        """
        policy = self.accelerator.unwrap_model(self.model)
        if not any(x.requires_grad for x in policy.parameters()):
            raise ValueError(
                "model: got nothing to train, no parameter requires a gradient; wanted one that does (an adapter that "
                "is loaded: PeftModel.from_pretrained(..., is_trainable=True))"
            )
        if self.ref_model is None and (is_peft_model(policy) or not getattr(self.args, "reference_cache", None)):
            reference.check_own_reference(policy)
        check_parallelism(getattr(self.accelerator, "parallelism_config", None), policy, self.ref_model)
        keep_pairs_together(self.accelerator)
        if max_length is not None and self.args.process_index == 0:
            print(f"TDPO: {self._way_of_the_loss(policy, max_length)}", flush=True)

    def _way_of_the_loss(self, policy: nn.Module, max_length: int) -> str:
        args, config, weight = self.args, policy.config.get_text_config(), policy.get_output_embeddings().weight
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else weight.dtype
        pairs, trained = args.per_device_train_batch_size, weight.requires_grad
        return explain_way(2 * pairs * max_length, pairs, config.vocab_size, config.hidden_size, dtype, trained=trained,
                           memory_budget=self.loss_options.memory_budget, device=args.device)  # fmt: skip

    def tdpo_loss(self, model: nn.Module, pairs: Batch, inputs: Batch | None = None, aux_weight: float = 0.0) -> Tensor:
        """Return the mean over the pairs of a batch, and keep what is logged of it.

        Args:
            pairs: as `step.pair_loss` takes them.
            inputs: what the model is called with, ``(2P, L)``, the P chosen rows first. None: what `pairs` has of it.
            aux_weight: the weight of a mixture of experts' auxiliary loss.
        """
        policy = self.accelerator.unwrap_model(model)
        pairs = packed(pairs) if self._packs else pairs
        inputs = model_inputs(pairs) if inputs is None else inputs
        router = {"output_router_logits": True} if aux_weight else {}
        with self.accelerator.autocast():
            self._check_heads(model, inputs, pairs.get("cu_seqlens"))
            theirs = self.reference_side(model, policy, inputs, pairs)
            loss = pair_loss(pairs, self.loss_options)
            out = pair_outputs(model, theirs, {**inputs, **router}, loss, unwrapped=policy)
        if not aux_weight:
            self._record(out["sums"])
            return out["loss"]
        aux = aux_loss_of(out)
        self._record(with_aux_loss(out["sums"], aux, aux_weight))
        return out["loss"] + aux_weight * aux

    def reference_side(self, model: nn.Module, policy: nn.Module, inputs: Batch, pairs: Batch) -> Reference:
        """Return the reference's side of a batch, by ``ref_model`` or by the policy without its adapter."""
        if self.ref_model is None:
            return reference.from_adapter(model, policy, inputs)
        return reference.from_model(self.ref_model, self.accelerator.unwrap_model(self.ref_model), inputs)

    def _check_heads(self, model: nn.Module, inputs: Batch, cu_seqlens: Tensor | None) -> None:
        """Check once, on the first batch, that the models' logits are what the loss takes them for."""
        models = [x for x in (model, self.ref_model) if x is not None]  # a compiled one has no truth
        for wrapped in [] if self._heads_checked else models:
            unwrapped = self.accelerator.unwrap_model(wrapped)
            if cu_seqlens is not None:
                check_packing(unwrapped, inputs, cu_seqlens, wrapped)
            check_head(unwrapped, inputs, wrapped=wrapped)
        self._heads_checked = True

    def _record(self, sums: Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        copies = copies_of_a_batch(getattr(self.accelerator, "parallelism_config", None), self.model)
        counted = len(sums) if mode == "train" else pairs_that_count(self.accelerator, len(sums), copies)
        total = total_over_processes(sums[:counted], self.accelerator.gather)
        if mode == "train":
            self._kept()[TOKENS_SEEN] += int(means_of(total)[TOKENS_SEEN]) // copies
        self._sums[mode] = self._sums.get(mode, 0) + total

    def _kept(self) -> dict[str, int]:
        """Return what a checkpoint keeps of the run beside the trainer's own: it lies in the trainer's state."""
        return self.state.stateful_callbacks.setdefault("TDPO", {TOKENS_SEEN: 0})

    def _means(self, mode: str) -> dict[str, float]:
        """Return what `mode` has added up, and begin anew. Tokens are those of training, as in TRL."""
        return means_of(self._sums.pop(mode)) | self._kept() if mode in self._sums else {}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what training has added up since the last call, too."""
        means = self._means("train") if self.model.training else {}
        logs.update({name: value for name, value in means.items() if name != "loss"})
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Add means over the pairs of the set, the loss among them, each pair counted once however many processes."""
        self._sums.pop("eval", None)
        out = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        out.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self._means("eval").items()})
        return out

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the loss only: there are no logits."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None
