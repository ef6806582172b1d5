"""TDPO as a Lightning module: copy this file. Run with lightning 2.6 on CPUs, in one process and in two (DDP).

    trainer = lightning.Trainer(max_epochs=1)
    trainer.fit(TDPOModule(policy, reference, LossOptions(beta=0.1, alpha=0.5), lr=1e-6), batches)

`batches` yields what `tdpo_trainer.plain.collate` makes.
"""

from __future__ import annotations

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
        inputs = model_inputs(batch)
        if self.global_step == 0 and index == 0:
            for model in (self.policy, self.reference):
                check_head(model, inputs)
        theirs = reference_side(self.reference, inputs, unwrapped=self.reference)
        out = pair_outputs(self.policy, theirs, inputs, pair_loss(batch, self.options), unwrapped=self.policy)
        pairs = len(batch["input_ids"]) // 2
        means = means_of(out["sums"].sum(0))
        self.log_dict({"loss": out["loss"].detach()} | means, batch_size=pairs, sync_dist=True, prog_bar=False)
        together = self.trainer.accumulate_grad_batches  # Lightning divides by it, in a shorter last step too
        in_step = min(together, self.trainer.num_training_batches - index // together * together)
        return out["loss"] * (together / in_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.policy.parameters(), lr=self.lr, weight_decay=0.0)
