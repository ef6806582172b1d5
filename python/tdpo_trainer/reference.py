"""Where the reference's side of a batch comes from: a cache, a model of its own, or the policy under its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from .forward import Reference, reference_side
from .kernels import LMHead
from .step import Batch, model_inputs


def from_model(wrapped: nn.Module, model: nn.Module, batch: Batch) -> Reference:
    """Of a model of its own, with its own head."""
    return reference_side(wrapped, model_inputs(batch), unwrapped=model)


def from_adapter(wrapped: nn.Module, policy: nn.Module, batch: Batch) -> Reference:
    """Of a PEFT policy: the model under its adapter. One head serves both, unless the adapter is on the head."""
    within = partial(adapter_of_reference, policy)
    return reference_side(wrapped, model_inputs(batch), unwrapped=policy, policy_within=within)


def from_cache(batch: Batch, head: LMHead | None) -> Reference:
    return Reference(batch["ref_hidden"], head)


@contextmanager
def adapter_of_reference(policy: nn.Module) -> Iterator[None]:
    """A PEFT policy as its own reference: its ``"ref"`` adapter where there is one, else no adapter at all."""
    if "ref" not in policy.peft_config:
        with policy.disable_adapter():
            yield
        return
    active = policy.active_adapter
    policy.set_adapter("ref")
    try:
        yield
    finally:
        policy.set_adapter(active)
