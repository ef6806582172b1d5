"""The rows of the reference's head that belong to this rank's part of the policy's vocabulary."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

from ..collectives import exchanged, position
from ..types import LMHead, Model, VocabParallelHead


def reference_part(reference: Model, policy_head: VocabParallelHead) -> Model:
    """A head that every rank has whole is cut, which copies nothing. One that is split in other places is exchanged,
    row by row, on every call."""
    head, me = reference.head, position(policy_head.group)
    wanted = _bounds(policy_head.sizes)
    if not isinstance(head, VocabParallelHead):
        first, last = wanted[me]
        bias = None if head.bias is None else head.bias[first:last]
        return replace(reference, head=replace(head, weight=head.weight[first:last], bias=bias))
    if head.sizes == policy_head.sizes:
        return reference
    held = _bounds(head.sizes)
    sent = [_common(held[me], there) for there in wanted]
    received = [_common(there, wanted[me]) for there in held]
    weight, bias = (
        None if x is None else exchanged(x.detach(), sent, received, policy_head.group)
        for x in (head.weight, head.bias)
    )
    return replace(reference, head=LMHead(weight, bias, head.logit_scale, head.softcap))


def _bounds(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    ends = list(accumulate(sizes))
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _common(a: tuple[int, int], b: tuple[int, int]) -> int:
    return max(min(a[1], b[1]) - max(a[0], b[0]), 0)
