"""TDPO in LLaMA-Factory: stage `dpo` with the TDPO loss. Run with llamafactory 0.9.5, trl 0.24.0, transformers 4.57.6.

    python llama_factory_tdpo.py run.yaml [name=value ...]
    torchrun --nproc-per-node 2 llama_factory_tdpo.py run.yaml

``run.yaml`` is what ``llamafactory-cli train`` takes, with ``stage: dpo``; its ``pref_beta`` is beta. It may also have
``tdpo_alpha`` (default 0.5), ``tdpo_variant`` (tdpo2 or tdpo1), ``tdpo_backend`` and ``tdpo_memory_budget``.
`dpo_mixin.py` lies beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from dpo_mixin import PREFIX, LabelledTDPOMixin, loss_options, refuse, settings_of
from llamafactory.extras.misc import is_env_enabled, use_ray
from llamafactory.hparams.parser import read_args
from llamafactory.train.dpo import trainer as dpo
from llamafactory.train.tuner import run_exp


class TDPOTrainer(LabelledTDPOMixin, dpo.CustomDPOTrainer):
    """LLaMA-Factory's DPO trainer with the TDPO loss; its ``ref_model``, or the model without its adapter."""

    settings: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, model: Any, ref_model: Any, finetuning_args: Any, **kwargs: Any) -> None:
        _check(finetuning_args, kwargs["data_collator"])
        super().__init__(model=model, ref_model=ref_model, finetuning_args=finetuning_args, **kwargs)
        self.begin(loss_options(self.beta, self.settings), self.args)
        self.check_models()


def _check(args: Any, collator: Any) -> None:
    refuse(
        {
            "pref_loss": (args.pref_loss, "sigmoid"),
            "dpo_label_smoothing": (args.dpo_label_smoothing, 0.0),
            "pref_ftx": (args.pref_ftx, 0.0),
            "pref_bco_weight": (args.pref_bco_weight, 0.0),
            "ld_alpha": (args.ld_alpha, None),
            "ignore_pad_token_for_loss": (collator.label_pad_token_id == -100, True),
        }
    )


def main() -> None:
    """`llamafactory-cli train`, in this process. Raises ValueError where another trainer than this one would run."""
    args = read_args()
    if not isinstance(args, dict):
        raise ValueError("llama_factory_tdpo.py: wanted a .yaml or .json file first, as `llamafactory-cli train` takes")
    settings = settings_of(args)
    refuse(
        {
            "stage": (args.get("stage"), "dpo"),
            "use_ray": (bool(args.get("use_ray") or use_ray()), False),
            "USE_MCA": (is_env_enabled("USE_MCA"), False),
            "moe_aux_loss_coef": (args.get("moe_aux_loss_coef"), None),
        }
    )
    loss_options(args.get("pref_beta", 0.1), settings)  # before a model is loaded
    TDPOTrainer.settings = settings
    dpo.CustomDPOTrainer = TDPOTrainer
    run_exp({name: value for name, value in args.items() if not name.startswith(PREFIX)})


if __name__ == "__main__":
    main()
