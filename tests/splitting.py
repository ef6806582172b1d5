"""How tests split a vocabulary over ranks."""

from __future__ import annotations

from dataclasses import replace

from tdpo_kernels import LMHead

CUTS = ("chunk", "even", "one", "last")


def rows_of(V: int, world: int, how: str) -> list[slice]:
    """Of each rank: as torch cuts; as evenly as it goes; one row, none, none and the rest; all on the last."""
    if how == "chunk":
        step = -(-V // world)
        ends = [min(step * (k + 1), V) for k in range(world)]
    elif how == "even":
        ends = [V * (k + 1) // world for k in range(world)]
    else:
        ends = [1 if how == "one" else 0] * (world - 1) + [V]
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def cut(head: LMHead, rows: slice) -> LMHead:
    return replace(head, weight=head.weight[rows], bias=None if head.bias is None else head.bias[rows])
