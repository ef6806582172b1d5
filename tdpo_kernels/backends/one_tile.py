"""All of ``[T, V]`` in one tile: no walk, no merge, and nothing asked of the device. What a small call costs is the
launching of operations, and here they are few. The mathematics are `tile_math.py`'s.

Kept for backward, or computed once more: p, q, p - q, of which each row's excess times p is to be taken off, and a
softcap's slope. From those eq. (6) needs no exponential: ``dz = g_kl (p - q) - g_logp p``, or ``-g_kl q`` where both
cotangents are equal. What the label's entry has besides makes up for the other entries of p (q): 1 - p_y, however sure
the label is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import Forward, Gradients, Inputs, LMHead, Model, Needs
from . import tile_math
from .products import SIXTEEN_BIT, accumulate_, logits_
from .slab import tile_of


def takes(inputs: Inputs) -> bool:
    """Whether the call has no more rows and columns than the walk's tiles; logits and a copy of a hidden state, or dW,
    no more bytes than one in fp32; and all of it one dtype."""
    policy, reference, dtype = inputs.policy, inputs.reference, inputs.stats_dtype
    T, V = inputs.rows.count, policy.head.weight.shape[0]
    D = max(policy.hidden.shape[1], reference.hidden.shape[1])
    R, C = tile_of(policy.hidden.device)
    entries = max(T * (V + D), V * D)
    if inputs.partial or T > R or V > C or entries * dtype.itemsize > R * C * torch.float32.itemsize:
        return False
    return all(dtype == x.dtype == x.hidden.dtype == x.head.weight.dtype for x in (policy, reference))


def most_kept(policy: Model, rows: int) -> int:
    """Bytes of planes that are kept of a call of so many rows, or fewer; 0 where `takes` would have none of it."""
    V = policy.head.weight.shape[0]
    R, C = tile_of(policy.hidden.device)
    if V > C or policy.dtype in SIXTEEN_BIT:
        return 0
    return _plane_count(policy.head) * min(rows, R) * V * policy.dtype.itemsize


def _plane_count(head: LMHead) -> int:
    return 3 if head.softcap is None else 4


class _Statistics(NamedTuple):
    logps_2T: Tensor
    kl: Tensor
    excess: Tensor
    extras: dict[str, Tensor]


def forward(inputs: Inputs, needs: Needs) -> Forward:
    shape, dtype = _shape(inputs, _plane_count(inputs.policy.head)), inputs.stats_dtype
    keep = bool(needs) and math.prod(shape) * dtype.itemsize <= inputs.memory_budget
    planes = inputs.keep(*shape, dtype=dtype) if keep else _empty(inputs, shape)
    found = _statistics(inputs, planes, inputs.extras)
    saved = (found.excess, planes if keep else None) if needs else ()
    return tile_math.finished(inputs, [*found.logps_2T.unbind(), found.kl], found.extras, saved)


def backward(
    inputs: Inputs,
    needs: Needs,
    saved: tuple[Tensor | None, ...],
    g_logp_T: Tensor | None,
    g_kl_T: Tensor | None,
) -> Gradients:
    excess, planes = saved
    if planes is None:
        planes = _again(inputs, only_p=g_kl_T is None)
    dz = _dz(inputs, planes, excess, g_logp_T, g_kl_T)
    dw = None
    if needs.weight:
        weight = inputs.policy.head.weight
        dw = _product(dz.T, _rows(inputs, inputs.policy), torch.empty_like(weight))
    return Gradients(_dh(inputs, dz) if needs.hidden else None, dw, dz.sum(0) if needs.bias else None)


def _dh(inputs: Inputs, dz: Tensor) -> Tensor:
    policy, index = inputs.policy, inputs.rows.hidden_T
    if index is None:
        return _product(dz, policy.head.weight, torch.empty_like(policy.hidden))
    dh_TD = _product(dz, policy.head.weight, dz.new_empty(len(dz), policy.hidden.shape[1]))
    return torch.zeros_like(policy.hidden).index_copy_(0, index, dh_TD)


def _shape(inputs: Inputs, planes: int) -> tuple[int, int, int]:
    return planes, inputs.rows.count, inputs.policy.head.weight.shape[0]


def _empty(inputs: Inputs, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=inputs.stats_dtype, device=inputs.policy.hidden.device)


def _rows(inputs: Inputs, model: Model) -> Tensor:
    index = inputs.rows.hidden_T
    return model.hidden if index is None else model.hidden.index_select(0, index)


def _logits_(out: Tensor, inputs: Inputs, model: Model, slope: Sequence[Tensor] = ()) -> None:
    """And the slope of a softcap, if there is a place for it."""
    logits_(out, _rows(inputs, model), model.head.weight)
    tile_math.apply_head_(out, model.head, model.head.bias)
    for place in slope:
        tile_math.softcap_slope(out, model.head.softcap, out=place)


def _again(inputs: Inputs, only_p: bool) -> Tensor:
    """The planes, for backward; or of them no more than p and a softcap's slope."""
    planes = _empty(inputs, _shape(inputs, _plane_count(inputs.policy.head)))
    if not only_p:
        _statistics(inputs, planes, ())
        return planes
    p, z, _, *slope = planes.unbind()
    _logits_(z, inputs, inputs.policy, slope)
    torch.softmax(z, -1, out=p)
    return planes


def _statistics(inputs: Inputs, planes: Tensor, wanted: tuple[str, ...]) -> _Statistics:
    """Of every row, with the extras if any is `wanted`; and `planes`, filled."""
    pair_2TV = planes[:2]
    p, q, p_less_q, *slope = planes.unbind()
    logits_2TV = _empty(inputs, pair_2TV.shape)
    z, r = logits_2TV.unbind()
    _logits_(z, inputs, inputs.policy, slope)
    _logits_(r, inputs, inputs.reference)
    labels_2T = logits_2TV.gather(2, inputs.rows.labels_T[:, None].expand(2, -1, 1))[..., 0]
    tops_2T, lse_2T = tile_math.softmax(logits_2TV, out=pair_2TV)
    extras = tile_math.Extras()
    if wanted:
        extras.add(z, p, tops_2T[0], lse_2T[0], scratch=p_less_q)
    half_y, _ = tile_math.half_log_ratio_(logits_2TV, tops_2T, torch.sub(*lse_2T.unbind()), out=z)
    excess, kl = tile_math.divergence_(half_y, p, q, p_less_q, scratch=r)
    more = extras.results(tops_2T[0], lse_2T[0], labels_2T[0], z.shape[1]) if wanted else {}
    return _Statistics(labels_2T - tops_2T - lse_2T, kl, excess, more)


def _dz(inputs: Inputs, planes: Tensor, excess_T: Tensor, g_logp_T: Tensor | None, g_kl_T: Tensor | None) -> Tensor:
    """Eq. (6), at the outputs of ``h W^T + b``: b times p, or times q where a = b, whose label's entry is such that
    they sum to 0; and a times q - p."""
    zero, scale = torch.zeros_like(excess_T), -inputs.policy.head.logit_scale
    a, b = (zero[:, None] if g is None else (g * scale)[:, None] for g in (g_kl_T, g_logp_T))
    (p, q, p_less_q, *slope), label = planes.unbind(), inputs.rows.labels_T[:, None]
    if g_kl_T is None:
        dz = p.scatter(1, label, 0.0)
        at_label = dz.sum(-1, keepdim=True) * -b
        dz.mul_(b)
    else:
        only_q, excess = a == b, excess_T[:, None]
        dz = torch.where(only_q, q, p).scatter_(1, label, 0.0)
        a = a.masked_fill(only_q, 0.0)
        p_y, p_less_q_y = planes[0:3:2].gather(2, label.expand(2, -1, 1)).unbind()
        at_label = (excess * p_y).sub_(p_less_q_y).mul_(a).sub_(dz.sum(-1, keepdim=True).mul_(b))
        dz.mul_(torch.addcmul(b, a, excess)).sub_(p_less_q * a)
    dz.scatter_(1, label, at_label)
    return dz.mul_(slope[0]) if slope else dz


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    accumulate_(out, a, b, 1.0, keep=0)
    return out
