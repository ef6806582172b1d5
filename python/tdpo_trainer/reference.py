"""Compute the reference's side of a batch: by a model of its own, or by the policy under its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from accelerate.utils import is_peft_model
from torch import nn

from .adapters import names_of_adapters
from .forward import Reference, reference_side
from .step import Batch, model_inputs

OWN = "ref"  # the adapter that TRL makes of one that was trained before
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # beginnings of such init_lora_weights


def from_model(wrapped: nn.Module, model: nn.Module, batch: Batch) -> Reference:
    """Return the reference's side by a model of its own, with its own head."""
    return reference_side(wrapped, model_inputs(batch), unwrapped=model)


def from_adapter(wrapped: nn.Module, policy: nn.Module, batch: Batch) -> Reference:
    """Return the reference's side by a PEFT policy's base model. One head serves both, unless an adapter is on it."""
    within = partial(adapter_of_reference, policy)
    return reference_side(wrapped, model_inputs(batch), unwrapped=policy, policy_within=within)


@contextmanager
def adapter_of_reference(policy: nn.Module) -> Iterator[None]:
    """Make a PEFT policy its own reference: with its ``"ref"`` adapter where there is one, else without any.

    PEFT switches ``requires_grad`` of adapters as it goes, and leaves all that are active trained. Here each flag is
    put back: of the parameters there at the beginning, and of those that FSDP has put in their place at the end.
    """
    entered, active = list(policy.named_parameters()), policy.active_adapter
    flags = {name: x.requires_grad for name, x in entered}
    try:
        if OWN in policy.peft_config:
            policy.set_adapter(OWN)
            yield
        else:
            with policy.disable_adapter():
                yield
    finally:
        if OWN in policy.peft_config:
            policy.set_adapter(active)
        for name, x in (*entered, *policy.named_parameters()):
            x.requires_grad_(flags.get(name, x.requires_grad))


def check_own_reference(policy: nn.Module) -> None:
    """Check that a policy is a PEFT model whose base model is what training begins with, and stays so.

    Raises:
        ValueError: not so, naming the option or the weight, and a way out.
    """
    if not is_peft_model(policy):
        raise ValueError("ref_model: got None, wanted a model: only a PEFT model is its own reference")
    adapters, active = policy.peft_config, list(policy.active_adapters)
    if OWN in active:
        raise ValueError(f"model: got an adapter in training named {OWN!r}, the reference's; wanted another name")
    if OWN in adapters and len(active) > 1:
        raise ValueError(
            f"model: got the active adapters {', '.join(active)} beside {OWN!r}, wanted one, or a ref_model"
        )
    for name in [OWN] if OWN in adapters else adapters:
        if option := _changes_base(adapters[name]):
            raise ValueError(
                f"{option} of adapter {name!r}: it changes the weights under the adapter, so that the model without it "
                f"is not what training begins with; wanted a ref_model, or (PlainTDPOTrainer) an adapter {OWN!r}, made "
                "with init_lora_weights=True, that the trained one's weights were copied into"
            )
    of_adapters, prefix = names_of_adapters(policy), getattr(policy.base_model, "prefix", None) or " "
    for name, x in policy.named_parameters():
        if x.requires_grad and name not in of_adapters and prefix not in name:
            raise ValueError(
                f"model: {name} is trained beside the adapter (bias, requires_grad), and the reference with it; wanted "
                "it frozen, in modules_to_save, or a ref_model"
            )


def _changes_base(adapter: Any) -> str:
    """The option of a LoRA that changes the weights it is put on, as it is written; empty if there is none."""
    how = getattr(adapter, "init_lora_weights", None)
    if isinstance(how, str) and how.lower().startswith(CHANGES_BASE):
        return f"init_lora_weights={how!r}"
    return "kasa_config" if getattr(adapter, "kasa_config", None) is not None else ""
