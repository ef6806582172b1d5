"""The rows of the reference's head that belong to this rank's part of the policy's vocabulary."""

from __future__ import annotations

from dataclasses import replace

from ..collectives import exchanged
from ..types import LMHead, Model, VocabParallelHead


def reference_part(reference: Model, policy_head: VocabParallelHead) -> Model:
    """A head that every rank has whole is cut, which copies nothing. One that is split in other places is exchanged,
    row by row, on every call."""
    head, wanted = reference.head, policy_head.columns
    if not isinstance(head, VocabParallelHead):
        bias = None if head.bias is None else head.bias[wanted]
        return replace(reference, head=replace(head, weight=head.weight[wanted], bias=bias))
    if head.sizes == policy_head.sizes:
        return reference
    ranks = range(len(head.sizes))
    sent = [_common(head.columns, policy_head.columns_of(rank)) for rank in ranks]
    received = [_common(head.columns_of(rank), wanted) for rank in ranks]
    weight, bias = (
        None if x is None else exchanged(x.detach(), sent, received, policy_head.group)
        for x in (head.weight, head.bias)
    )
    return replace(reference, head=LMHead(weight, bias, head.logit_scale, head.softcap))


def _common(a: slice, b: slice) -> int:
    return max(min(a.stop, b.stop) - max(a.start, b.start), 0)
