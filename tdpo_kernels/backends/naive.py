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
    with torch.no_grad():
        z_TV, r_TV = (_logits(_operand(inputs, side), side) for side in (inputs.policy, inputs.reference))
        every = reference.extra_statistics(z_TV, inputs.rows.labels_T) if inputs.extras else {}
        z_TV, r_TV = _some_left(inputs, z_TV), _some_left(inputs, r_TV)
        logp, ref_logp, kl = reference.statistics(z_TV, r_TV, inputs.rows.labels_T)
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
    head, wanted = inputs.policy.head, (needs.hidden, needs.weight, needs.bias)
    hidden = _operand(inputs, inputs.policy) if inputs.partial else inputs.policy.hidden
    with torch.enable_grad():
        parts = [
            x if x is None else _versioned(x).detach().requires_grad_(want)
            for x, want in zip((hidden, head.weight, head.bias), wanted, strict=True)
        ]
        policy = replace(inputs.policy, hidden=parts[0], head=replace(head, weight=parts[1], bias=parts[2]))
        z_TV = _logits(policy.hidden if inputs.partial else _operand(inputs, policy), policy)
        dz_TV = _dlogits(inputs, z_TV.detach(), g_logp_T, g_kl_T, g_label_T)
        leaves = [x for x, want in zip(parts, wanted, strict=True) if want]
        grads = iter(torch.autograd.grad(z_TV, leaves, dz_TV, materialize_grads=True))
    return Gradients(*(next(grads) if want else None for want in wanted))


def _dlogits(
    inputs: Inputs, z_TV: Tensor, g_logp_T: Tensor | None, g_kl_T: Tensor | None, g_label_T: Tensor | None
) -> Tensor:
    """Eq. (6), by autograd."""
    z_TV, labels_T = _some_left(inputs, z_TV).requires_grad_(), _versioned(inputs.rows.labels_T)
    r_TV = _some_left(inputs, _logits(_operand(inputs, inputs.reference), inputs.reference))
    logp, _, kl = reference.statistics(z_TV, r_TV, labels_T)
    pairs = [(out, g) for out, g in ((logp, g_logp_T), (kl, g_kl_T)) if g is not None]
    if g_label_T is not None:  # where the label is elsewhere, minus what logp has at its stand-in
        at_label = torch.where(inputs.rows.own_T, g_label_T, -g_logp_T)
        pairs.append((z_TV.gather(1, labels_T[:, None])[:, 0], at_label))
    return torch.autograd.grad([out for out, _ in pairs], z_TV, [g for _, g in pairs])[0]


def _versioned(x: Tensor) -> Tensor:
    """Autograd saves no inference tensor: a copy of one, made outside inference mode, is none."""
    return x.clone() if x.is_inference() else x


def _some_left(inputs: Inputs, z_TV: Tensor) -> Tensor:
    """A part of the vocabulary may be ruled out as a whole."""
    return torch.where(torch.isneginf(z_TV).all(-1, keepdim=True), LOWEST, z_TV) if inputs.partial else z_TV


def _operand(inputs: Inputs, model: Model) -> Tensor:
    """``(T, D)`` in the statistics' dtype: what a model's products are taken of. Rounded to its compute dtype, which
    only autocast makes another than its own."""
    index_T = inputs.rows.hidden_T
    hidden_TD = model.hidden if index_T is None else model.hidden.index_select(0, index_T)
    return hidden_TD.to(model.dtype).to(inputs.stats_dtype)


def _logits(operand_TD: Tensor, model: Model) -> Tensor:
    head, bias = model.head, model.head.bias
    head = replace(head, weight=head.weight.to(model.dtype), bias=None if bias is None else bias.to(model.dtype))
    return reference.logits(operand_TD, head, operand_TD.dtype)
