"""Run another backend on each rank's columns of a vocabulary split over ranks, with one all-gather of states.

Forward merges all ranks' states by eq. (8), in rank order, so every rank has the same bits. Backward is the same
backward on each rank's columns, from the state of the whole row; dh is summed over the ranks in the statistics' dtype,
then rounded; dW and db stay where they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor

from ..collectives import exchanged, gathered, same, summed_, told
from ..types import SUMMANDS, Gradients, Inputs, LMHead, Model, Needs, Part, VocabParallelHead
from . import rowmath
from .logits import ruled_out
from .walk import Backend

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def forward(inner: Backend, inputs: Inputs, needs: Needs, kept: Tensor) -> tuple[Part, Tensor | None]:
    """Return the merged part of all ranks, and `ruled_out` over all ranks' columns."""
    _agree_once(inputs, needs)
    group, own = inputs.policy.head.group, _own(inputs)
    part = inner.forward(own, kept) if own.policy.head.weight.shape[0] else _nothing(own)
    sent_WFT = gathered(torch.cat([part.state, part.labels]), group)
    out = ruled_out(own.policy, own.reference)
    out = None if out is None else summed_(out.to(torch.int32), group) > 0
    return Part(rowmath.merge(sent_WFT[:, :-2]), sent_WFT[:, -2:].sum(0)), out


def backward(
    inner: Backend, inputs: Inputs, needs: Needs, kept: Tensor, row: Tensor, total: Gradients | None
) -> Gradients:  # fmt: skip
    own, head, hidden = _own(inputs), inputs.policy.head, inputs.policy.hidden
    if head.weight.shape[0]:
        dh, dw, db = inner.backward(own, needs, kept, row, SUMMANDS if total is None else total)
    else:
        zero_TD = row.new_zeros(inputs.rows.count, hidden.shape[-1])
        dh, dw, db = zero_TD, torch.zeros_like(head.weight), None if head.bias is None else torch.zeros_like(head.bias)
    if not needs.hidden:
        return Gradients(None, dw, db)
    dh, index = summed_(dh, head.group), inputs.rows.hidden_T
    if total is not None:
        return Gradients(dh, dw, db)
    dh = dh.to(hidden.dtype)
    if index is not None:
        dh = dh.new_zeros(hidden.shape[:-1].numel(), hidden.shape[-1]).index_copy_(0, index, dh)
    return Gradients(dh, dw, db)


def _own(inputs: Inputs) -> Inputs:
    """Return the inputs with this rank's columns only, where labels in other ranks' columns are -1."""
    head = inputs.policy.head
    columns, labels_T = head.columns, inputs.rows.labels_T
    inside = (labels_T >= columns.start) & (labels_T < columns.stop)
    rows = replace(inputs.rows, labels_T=(labels_T - columns.start).masked_fill(~inside, -1))
    policy = inputs.policy._replace(head=LMHead(head.weight, head.bias, head.logit_scale, head.softcap))
    return replace(inputs, policy=policy, reference=_reference_part(inputs.reference, head), rows=rows)


def _nothing(own: Inputs) -> Part:
    """Return the part of a rank without columns."""
    like = own.policy.hidden.new_empty(rowmath.STATE + 2 * bool(own.extras), own.rows.count, dtype=own.stats_dtype)
    return Part(rowmath.empty(like), like.new_zeros(2, own.rows.count))


# --- a reference head that is whole, or split in other places ---------------------------------------------------------


def _reference_part(reference: Model, policy_head: VocabParallelHead) -> Model:
    """Return the reference with the rows of its head that belong to this rank's part of the policy's vocabulary.

    A head that every rank has whole is cut without a copy. One that is split in other places is exchanged, row by row,
    on every call.
    """
    head, wanted = reference.head, policy_head.columns
    if head.group is None:
        weight, bias = head.weight[wanted], None if head.bias is None else head.bias[wanted]
    elif head.sizes == policy_head.sizes:
        weight, bias = head.weight, head.bias
    else:
        ranks = range(len(head.sizes))
        sent = [_common(head.columns, policy_head.columns_of(rank)) for rank in ranks]
        received = [_common(head.columns_of(rank), wanted) for rank in ranks]
        weight, bias = (
            None if x is None else exchanged(x.detach(), sent, received, policy_head.group)
            for x in (head.weight, head.bias)
        )
    return reference._replace(head=LMHead(weight, bias, head.logit_scale, head.softcap))


def _common(a: slice, b: slice) -> int:
    return max(min(a.stop, b.stop) - max(a.start, b.start), 0)


_agreed: WeakSet[ProcessGroup] = WeakSet()  # groups, not names, which are used again once a group is destroyed


def _agree_once(inputs: Inputs, needs: Needs) -> None:
    """Raise ValueError where ranks have different tokens or heads, which would return nonsense or hang. Only a group's
    first call compares them, because that waits for the device."""
    group, rows = inputs.policy.head.group, inputs.rows
    if group in _agreed:
        return
    checksum = int((rows.labels_T * torch.arange(1, rows.count + 1).to(rows.labels_T)).sum())
    facts = {"labels, memory_budget: how many go together": rows.count, "labels: a checksum": checksum}
    facts |= {"extras": inputs.extras, "hidden: its gradient is wanted": needs.hidden}
    for name, side in (("head", inputs.policy), ("ref_head", inputs.reference)):
        head = side.head
        facts |= {
            f"{name}: rows of each rank": getattr(head, "sizes", head.vocab),
            f"{name}.weight: D": head.weight.shape[1],
            f"{name}.weight: computed in": side.dtype,
            f"{name}.bias: there is one": head.bias is not None,
            f"{name}.logit_scale": head.logit_scale,
            f"{name}.softcap": head.softcap,
        }
    same(told(tuple(map(str, facts.values())), group), tuple(facts))
    _agreed.add(group)
