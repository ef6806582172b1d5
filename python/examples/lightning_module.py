"""TDPO as a Lightning module: copy this file. Run with lightning 2.6 on CPUs, in one process and in two (DDP).

    trainer = lightning.Trainer(max_epochs=1)
    trainer.fit(TDPOModule(policy, reference, LossOptions(beta=0.1, alpha=0.5), lr=1e-6), batches, held_out)

`batches` and `held_out` yield what `tdpo_trainer.plain.collate` makes. Checkpoints hold the policy and no reference:
give the module the same reference when one is loaded.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from tdpo_trainer.forward import pair_outputs, reference_side
from tdpo_trainer.head import check_head
from tdpo_trainer.metrics import means_of
from tdpo_trainer.step import Batch, LossOptions, model_inputs, pair_loss
from torch import Tensor, nn


class TDPOModule(lightning.LightningModule):
    """A policy, its frozen reference, and the TDPO loss as the training step.

    Lightning calls `training_step` within the forward of its DDP wrapper, so gradient hooks are armed; the models in
    here are bare. Dropout stays off. Under FSDP use the Accelerate loop or the trainer instead. The policy should be in
    fp32, because AdamW's steps round to nothing in bfloat16; ``precision="bf16-mixed"`` makes the products in it.
    """

    def __init__(self, policy: nn.Module, reference: nn.Module, options: LossOptions, *, lr: float) -> None:
        super().__init__()
        self.policy = policy.eval()
        self.reference = reference.eval().requires_grad_(False)
        self.options, self.lr = options, lr

    def on_fit_start(self) -> None:
        self.print(self.options.describe(self.device))

    def training_step(self, batch: Batch, index: int) -> Tensor:
        if self.global_step == 0 and index == 0:
            for model in (self.policy, self.reference):
                check_head(model, model_inputs(batch))
        loss = self._loss(batch, "")
        together = self.trainer.accumulate_grad_batches  # Lightning divides by it, in a shorter last step too
        in_step = min(together, self.trainer.num_training_batches - index // together * together)
        return loss * (together / in_step)

    def validation_step(self, batch: Batch, index: int) -> None:
        self._loss(batch, "val_")

    def _loss(self, batch: Batch, prefix: str) -> Tensor:
        """Return the mean over the batch's pairs, and log it under `prefix` with what `metrics` names."""
        inputs = model_inputs(batch)
        theirs = reference_side(self.reference, inputs, unwrapped=self.reference)
        out = pair_outputs(self.policy, theirs, inputs, pair_loss(batch, self.options), unwrapped=self.policy)
        means = {"loss": out["loss"].detach()} | means_of(out["sums"].sum(0))
        named = {f"{prefix}{name}": x for name, x in means.items()}
        self.log_dict(named, batch_size=len(batch["input_ids"]) // 2, sync_dist=True, prog_bar=False)
        return out["loss"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the reference, which is frozen and as large as the policy."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: x for name, x in state.items() if not name.startswith("reference.")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the module's own reference."""
        checkpoint["state_dict"] |= {f"reference.{name}": x for name, x in self.reference.state_dict().items()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.policy.parameters(), lr=self.lr, weight_decay=0.0)
