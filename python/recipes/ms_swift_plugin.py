"""TDPO in ms-swift, as an external plugin: `dpo` then is TDPO. Run with ms-swift 4.6.0, trl 0.29.1, transformers 5.19.

    swift rlhf --rlhf_type dpo --external_plugins ms_swift_plugin.py --beta 0.1 --model MODEL --dataset pairs.jsonl ...

`dpo_mixin.py` lies beside this file. What swift's command line has no name for is read from the environment:
``TDPO_ALPHA`` (default 0.5), ``TDPO_VARIANT`` (tdpo2 or tdpo1), ``TDPO_BACKEND``, ``TDPO_MEMORY_BUDGET``.
"""

from __future__ import annotations

import os
from typing import Any

from dpo_mixin import SETTINGS, LabelledTDPOMixin, loss_options, refuse
from swift.rlhf_trainers import DPOTrainer
from swift.trainers import TrainerFactory


class TDPOTrainer(LabelledTDPOMixin, DPOTrainer):
    """swift's `DPOTrainer` with the TDPO loss; the reference is ``--ref_model``, or the model without its adapter."""

    not_model_inputs = frozenset({"labels", "text_position_ids", "margin"})

    def __init__(self, model: Any = None, ref_model: Any = None, *args: Any, **kwargs: Any) -> None:
        _check(kwargs["args"], kwargs["template"])
        super().__init__(model, ref_model, *args, **kwargs)
        environment = {name: value for name in SETTINGS if (value := os.environ.get(f"TDPO_{name.upper()}"))}
        self.begin(loss_options(self.beta, environment), self.args)
        self.check_models()


def _check(args: Any, template: Any) -> None:
    loss_type = args.loss_type if isinstance(args.loss_type, str) else ", ".join(args.loss_type)
    refuse(
        {
            "padding_free": (bool(template.padding_free and not template.packing), False),
            "packing": (bool(template.packing), False),
            "sequence_parallel_size": (template.sequence_parallel_size, 1),
            "loss_type": (loss_type, "sigmoid"),
            "label_smoothing": (args.label_smoothing, 0.0),
            "rpo_alpha": (args.rpo_alpha, None),
            "ld_alpha": (args.ld_alpha, None),
            "f_divergence_type": (getattr(args, "f_divergence_type", "reverse_kl"), "reverse_kl"),
            "reference_free": (bool(args.reference_free), False),
            "ref_adapters": (args.ref_adapter_name, None),
            "router_aux_loss_coef": (args.router_aux_loss_coef, 0.0),
        }
    )


TrainerFactory.TRAINER_MAPPING["dpo"] = f"{__name__}.{TDPOTrainer.__name__}"
