"""TDPO in axolotl, as a plugin of `rl: dpo`. Run with axolotl 0.19.0, trl 1.9.0, transformers 5.16.1.

    rl: dpo
    rl_beta: 0.1
    tdpo_alpha: 0.5        # and tdpo_variant (tdpo2 or tdpo1), tdpo_backend, tdpo_memory_budget
    plugins: [axolotl_tdpo.TDPOPlugin]
    trainer_cls: axolotl_tdpo_trainer.TDPOTrainer

and ``PYTHONPATH=python/recipes axolotl train run.yaml``. The trainer is named apart because axolotl gives a plugin's
trainer no model.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from dpo_mixin import loss_options, refuse, settings_of
from pydantic import BaseModel

TRAINER = "axolotl_tdpo_trainer.TDPOTrainer"


class TDPOArgs(BaseModel):
    """Return the TDPO options of a configuration; beta is axolotl's ``rl_beta``."""

    tdpo_alpha: float | None = None
    tdpo_variant: str | None = None
    tdpo_backend: str | None = None
    tdpo_memory_budget: int | None = None


class TDPOPlugin(BasePlugin):
    """Adds `TDPOArgs` to what a configuration may have, and refuses one that would train something else."""

    def get_input_args(self) -> str:
        return f"{__name__}.{TDPOArgs.__name__}"

    def register(self, cfg: Any) -> None:
        refuse(
            {
                "rl": (cfg.get("rl"), "dpo"),
                "trainer_cls": (cfg.get("trainer_cls"), TRAINER),
                "context_parallel_size": (cfg.get("context_parallel_size") or 1, 1),
            }
        )
        loss_options(0.1, settings_of(cfg))  # before a model is loaded
