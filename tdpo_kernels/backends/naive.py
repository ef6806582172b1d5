"""The reference behind the backend interface: builds ``[T, V]``, again in backward. The baseline, and the switch to
throw when in doubt."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import reference
from ..types import Forward, Gradients, Inputs, Model, Needs


def forward(inputs: Inputs, needs: Needs) -> Forward:
    head = inputs.policy.head
    with torch.no_grad():
        z_TV, r_TV = _both_logits(inputs, inputs.policy.hidden, head.weight, head.bias)
        logp, ref_logp, kl = reference.statistics(z_TV, r_TV, inputs.rows.labels_T)
        every = reference.extra_statistics(z_TV, inputs.rows.labels_T) if inputs.extras else {}
    return Forward(logp, ref_logp, kl, {name: every[name] for name in inputs.extras})


def backward(
    inputs: Inputs, needs: Needs, saved: tuple[Tensor | None, ...], g_logp_T: Tensor | None, g_kl_T: Tensor | None
) -> Gradients:
    head = inputs.policy.head
    wanted = (needs.hidden, needs.weight, needs.bias)
    with torch.enable_grad():
        parts = [
            x if x is None else _versioned(x).detach().requires_grad_(want)
            for x, want in zip((inputs.policy.hidden, head.weight, head.bias), wanted, strict=True)
        ]
        logp, _, kl = reference.statistics(*_both_logits(inputs, *parts), _versioned(inputs.rows.labels_T))
        pairs = [(out, g) for out, g in ((logp, g_logp_T), (kl, g_kl_T)) if g is not None]
        leaves = [x for x, want in zip(parts, wanted, strict=True) if want]
        grads = iter(torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], materialize_grads=True))
    return Gradients(*(next(grads) if want else None for want in wanted))


def _versioned(x: Tensor) -> Tensor:
    """Autograd saves no inference tensor: a copy of one, made outside inference mode, is none."""
    return x.clone() if x.is_inference() else x


def _both_logits(inputs: Inputs, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    policy = replace(inputs.policy, hidden=hidden, head=replace(inputs.policy.head, weight=weight, bias=bias))
    return tuple(_logits(side, inputs.rows.hidden_T, inputs.stats_dtype) for side in (policy, inputs.reference))


def _logits(side: Model, index_T: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Operands are rounded to the compute dtype (only autocast makes that differ from their own), products are taken
    in `dtype`."""
    hidden_TD = side.hidden if index_T is None else side.hidden.index_select(0, index_T)
    bias = None if side.head.bias is None else side.head.bias.to(side.dtype)
    head = replace(side.head, weight=side.head.weight.to(side.dtype), bias=bias)
    return reference.logits(hidden_TD.to(side.dtype), head, dtype)
