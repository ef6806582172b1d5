"""The reference behind the backend interface: builds ``[T, V]``, again in backward. The baseline, and the switch to
throw when in doubt."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import reference
from ..types import Forward, Gradients, Inputs, Model, Needs
from .tile_math import LOWEST


def forward(inputs: Inputs, needs: Needs) -> Forward:
    head = inputs.policy.head
    with torch.no_grad():
        z_TV, r_TV = _both_logits(inputs, inputs.policy.hidden, head.weight, head.bias)
        logp, ref_logp, kl = reference.statistics(z_TV, r_TV, inputs.rows.labels_T)
        every = reference.extra_statistics(z_TV, inputs.rows.labels_T) if inputs.extras else {}
        state = _state(z_TV, r_TV) if inputs.partial else ()
    return Forward(logp, ref_logp, kl, {name: every[name] for name in inputs.extras}, state=state)


def _state(z_TV: Tensor, r_TV: Tensor) -> tuple[Tensor, ...]:
    z_top, r_top = z_TV.amax(-1), r_TV.amax(-1)
    lse_z, lse_r = (z_TV - z_top[:, None]).logsumexp(-1), (r_TV - r_top[:, None]).logsumexp(-1)
    return z_top, r_top, lse_z, lse_r, lse_z - lse_r


def backward(
    inputs: Inputs,
    needs: Needs,
    saved: tuple[Tensor | None, ...],
    g_logp_T: Tensor | None,
    g_kl_T: Tensor | None,
    g_label_T: Tensor | None = None,
) -> Gradients:
    head = inputs.policy.head
    wanted = (needs.hidden, needs.weight, needs.bias)
    with torch.enable_grad():
        parts = [
            x if x is None else _versioned(x).detach().requires_grad_(want)
            for x, want in zip((inputs.policy.hidden, head.weight, head.bias), wanted, strict=True)
        ]
        z_TV, r_TV = _both_logits(inputs, *parts)
        labels_T = _versioned(inputs.rows.labels_T)
        logp, _, kl = reference.statistics(z_TV, r_TV, labels_T)
        pairs = [(out, g) for out, g in ((logp, g_logp_T), (kl, g_kl_T)) if g is not None]
        if g_label_T is not None:
            own_T = inputs.rows.own_T
            at_label = g_label_T if g_logp_T is None else torch.where(own_T, g_label_T, -g_logp_T)
            pairs.append((z_TV.gather(1, labels_T[:, None])[:, 0], at_label))
        leaves = [x for x, want in zip(parts, wanted, strict=True) if want]
        grads = iter(torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], materialize_grads=True))
    return Gradients(*(next(grads) if want else None for want in wanted))


def _versioned(x: Tensor) -> Tensor:
    """Autograd saves no inference tensor: a copy of one, made outside inference mode, is none."""
    return x.clone() if x.is_inference() else x


def _both_logits(inputs: Inputs, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    policy = replace(inputs.policy, hidden=hidden, head=replace(inputs.policy.head, weight=weight, bias=bias))
    both = tuple(_logits(side, inputs.rows.hidden_T, inputs.stats_dtype) for side in (policy, inputs.reference))
    return tuple(_some_left(x) for x in both) if inputs.partial else both


def _some_left(z_TV: Tensor) -> Tensor:
    """A part of the vocabulary may be ruled out as a whole."""
    return torch.where(torch.isneginf(z_TV).all(-1, keepdim=True), LOWEST, z_TV)


def _logits(side: Model, index_T: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Operands are rounded to the compute dtype (only autocast makes that differ from their own), products are taken
    in `dtype`."""
    hidden_TD = side.hidden if index_T is None else side.hidden.index_select(0, index_T)
    bias = None if side.head.bias is None else side.head.bias.to(side.dtype)
    head = replace(side.head, weight=side.head.weight.to(side.dtype), bias=bias)
    return reference.logits(hidden_TD.to(side.dtype), head, dtype)
