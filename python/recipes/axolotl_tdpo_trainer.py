"""The trainer that `axolotl_tdpo` wants as ``trainer_cls``. `dpo_mixin.py` lies beside this file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.integrations.base import PluginManager
from axolotl_tdpo import TDPOPlugin
from dpo_mixin import loss_options, refuse, settings_of
from tdpo_trainer.config import FIXED
from tdpo_trainer.mixin import TDPOMixin
from tdpo_trainer.step import Batch
from torch import nn


class TDPOTrainer(TDPOMixin, AxolotlDPOTrainer):
    """axolotl's DPO trainer with the TDPO loss; the reference is axolotl's, or the model without its adapter."""

    def __init__(self, model: Any = None, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        refuse({name: (getattr(args, name, only), only) for name, (only, _) in FIXED.items()})
        refuse({"precompute_ref_log_probs": (args.precompute_ref_log_probs, False)})
        options = loss_options(args.beta, _settings())
        super().__init__(model, ref_model, args=args, **kwargs)
        refuse({"router_aux_loss_coef": (self.router_aux_loss_coef if self.aux_loss_enabled else 0.0, 0.0)})
        self.begin(options, self.args)
        self.check_models()

    def _compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False) -> Any:
        loss = self.tdpo_loss(model, inputs)
        return (loss, {"loss": loss}) if return_outputs else loss


def _settings() -> Mapping[str, Any]:
    manager = PluginManager.get_instance()
    if manager.cfg is None or not any(isinstance(plugin, TDPOPlugin) for plugin in manager.plugins.values()):
        raise ValueError("plugins: wanted axolotl_tdpo.TDPOPlugin, which reads the tdpo_ settings of a configuration")
    return settings_of(manager.cfg)
