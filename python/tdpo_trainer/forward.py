"""The loss within a wrapper's forward, where weights are whole and gradient hooks are armed.

A loss computed on the unwrapped model leaves DDP's gradients unsynchronised, silently, and a sharded head's
``full_tensor()`` gives it a wrong gradient under FSDP2. So two calls are redirected (`redirect.redirect`): the
wrapper's, to a function that runs the backbone and then the head; and the head module's, to the loss. Whatever gathers
a weight, frees it, gathers it again for backward and reduces its gradient does so by its own hooks, around the model or
around the head.

In a trainer::

    reference = reference_side(wrapped_ref, inputs, unwrapped=ref)             # or from a cache, or adapters: see below
    out = pair_outputs(wrapped, reference, inputs, loss, unwrapped=policy)
    (out["loss"] + coefficient * out.get("aux_loss", 0)).backward()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tdpo_kernels import LMHead

from .head import (
    base_head,
    family,
    head_is_adapted,
    head_pair,
    innermost,
    is_tensor_parallel,
    output_layer,
    run_backbone,
)
from .redirect import evaluating, redirect, refuse_compiled

__all__ = ["Loss", "Reference", "at_head", "pair_outputs", "redirect", "reference_side"]

Loss = Callable[[Tensor, LMHead, Tensor, LMHead], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Reference:
    """The reference's side of a batch, detached: ``hidden (2P, L, E)``, from a model or a cache, and its head.

    ``head=None``: the policy's own, as it is without adapters, which must be frozen.
    """

    hidden: Tensor
    head: LMHead | None


def pair_outputs(
    wrapped: nn.Module, reference: Reference, inputs: Mapping[str, Any], loss: Loss, *, unwrapped: nn.Module
) -> dict[str, Tensor]:
    """Return what `loss` makes of a batch of pairs, computed within `wrapped`'s forward.

    Args:
        wrapped: the policy as the trainer calls it: wrapped by DDP, FSDP1, DeepSpeed, or bare, FSDP2 included.
        reference: the other side: `reference_side`, or one from a cache.
        inputs: what the policy's own forward takes: ``input_ids (2P, L)``, the P chosen first, ``attention_mask``, ...
        loss: called once, as ``loss(hidden, head, ref_hidden, ref_head)``, the first arguments of `fused_tdpo_loss`.
            Returns tensors by name, one of them ``"loss"``.
        unwrapped: the model within `wrapped`: a causal LM, or its PEFT model.

    Returns:
        The tensors of `loss`, and ``"aux_loss"`` (scalar, differentiable) where the model makes one. Values are exactly
        `loss`'s, also where a wrapper casts what its module returns.

    Raises:
        UnsupportedModel: as `head.run_backbone` and `head.head_pair`.
        ValueError: there is no `reference.head`, and the policy's own is trained.
        TypeError, RuntimeError: as `redirect`; the model is compiled as a whole.
    """
    refuse_compiled(wrapped, unwrapped)
    exact: dict[str, Tensor] = {}
    if reference.head is None:
        _check_frozen_head(unwrapped)

    def at(hidden: Tensor, head: LMHead) -> dict[str, Tensor]:
        exact.update(loss(hidden, head, reference.hidden, reference.head or base_head(unwrapped)))
        return {name: x for name, x in exact.items() if x.requires_grad} or {"loss": exact["loss"]}

    def inside(**inputs: Any) -> dict[str, Tensor]:
        ours = run_backbone(unwrapped, **inputs)
        out = at_head(unwrapped, ours.last, at)
        if ours.aux_loss is not None:
            exact["aux_loss"] = ours.aux_loss
            out = {**out, "aux_loss": ours.aux_loss}
        return out

    through = redirect(wrapped, unwrapped, inside, **inputs)
    return exact | {name: _of_value(x, exact[name]) for name, x in through.items() if exact[name].requires_grad}


@torch.no_grad()
def reference_side(
    wrapped: nn.Module,
    inputs: Mapping[str, Any],
    *,
    unwrapped: nn.Module,
    policy_within: Callable[[], AbstractContextManager[Any]] | None = None,
) -> Reference:
    """The reference's hidden states and head, by its own forward, without dropout also while the policy is trained.

    The head's weight is the model's own tensor where that is whole outside of its forward; a sharded one (FSDP, ZeRO-3)
    is copied while it is gathered, ``V x E`` elements until the loss's backward, which needs it once more.

    Args:
        wrapped, unwrapped, inputs: as `pair_outputs`, of the reference model.
        policy_within: the reference is the policy itself, within this context: ``policy.disable_adapter``, or what
            switches to another adapter. Its head is left to `pair_outputs`, unless an adapter is on it. The context is
            entered within the forward: outside, FSDP2 would take peft's switching of ``requires_grad`` for good.
    """
    refuse_compiled(wrapped, unwrapped)
    kept: list[Reference] = []
    outside = _tensors(unwrapped)

    def keep(hidden: Tensor, head: LMHead) -> Tensor:
        own = policy_within is None or head_is_adapted(unwrapped)
        kept.append(Reference(hidden, _lasting(head, outside) if own else None))
        return hidden

    def inside(**inputs: Any) -> Tensor:
        with policy_within() if policy_within else nullcontext():
            return at_head(unwrapped, run_backbone(unwrapped, **inputs).last, keep)

    with evaluating(unwrapped):
        redirect(wrapped, unwrapped, inside, **inputs)
    return kept[0]


def at_head(model: nn.Module, hidden: Tensor, function: Callable[[Tensor, LMHead], Any]) -> Any:
    """``function(hidden, head)``, called as the head module is: within its hooks, its weight whole.

    To be called within a redirected forward of `model`'s wrapper. `hidden (B, L, D)` is what `head.run_backbone` gave;
    `function` gets it as the head would (FSDP's mixed precision casts it), both widened where LoRA is on the head. What
    is differentiable must be in what `function` returns: a tensor, a tuple or a dict.
    """
    layer = output_layer(model)
    return redirect(layer, innermost(layer), lambda hidden: function(*head_pair(model, hidden)), hidden)


def _check_frozen_head(policy: nn.Module) -> None:
    """Before the forward: within it, FSDP1's weights are views of what may be trained in part."""
    layer = innermost(output_layer(policy), adapters=False)
    if any(x.requires_grad for x in getattr(layer, "base_layer", layer).parameters()):
        raise ValueError(
            f"reference.head: got None for {family(policy)}, whose own LM head is trained; wanted the reference's head"
        )


def _of_value(through: Tensor, exact: Tensor) -> Tensor:
    """`exact`'s value with the gradient path of `through`, which a wrapper may have cast to 16 bits."""
    return through if through.dtype == exact.dtype else exact.detach() + (through - through.detach())


def _tensors(model: nn.Module) -> list[Tensor]:
    """The tensors of the head that stay as they are outside of a forward. ZeRO-3 empties its own in place."""
    layer = innermost(output_layer(model))
    kept = [x for module in layer.modules() for x in vars(module)["_parameters"].values() if not hasattr(x, "ds_id")]
    return [x.to_local() if is_tensor_parallel(x) else x for x in kept]


def _same_part(x: Tensor, y: Tensor | None) -> bool:
    """Compare parts of a split weight by their memory: `to_local` makes the tensor anew each time."""
    return type(y) is Tensor and x.shape == y.shape and x.data_ptr() == y.data_ptr()


def _lasting(head: LMHead, outside: list[Tensor]) -> LMHead:
    def lasting(x: Tensor | None) -> Tensor | None:
        return x if x is None or any(x is y or _same_part(x, y) for y in outside) else x.clone()

    return replace(head, weight=lasting(head.weight), bias=lasting(head.bias))
