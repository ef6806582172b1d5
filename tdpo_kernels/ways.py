"""Say which way a call of `fused_tdpo_loss` goes, and how many products it costs, before it is made."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import directions, groups, op
from .backends import grid
from .types import stats_dtype

AGAIN = 1.5  # products that make logits again, on average of TDPO2's chosen and rejected rows


class Way(NamedTuple):
    words: str
    products: float  # of ``2 T V D`` flops; fewer where rows of a tile all need one model's logits only

    def __str__(self) -> str:
        return f"{self.words}: {self.products:.2g} products"


def way(
    tokens: int, pairs: int, vocab: int, hidden_size: int, dtype: torch.dtype, *, trained: bool,
    memory_budget: int = op.DEFAULT_BUDGET, device: torch.device | str = "cpu",
) -> Way:  # fmt: skip
    """Return the way of a batch of so many `tokens` that count, in pairs of one length, on `device`.

    trained: whether the policy's head is; a frozen one costs a product less. One forward product is of each model.
    """
    with torch.device("meta"):
        weight = torch.empty(vocab, hidden_size, dtype=dtype, requires_grad=trained)
        hidden = torch.empty(2 * pairs, max(tokens // (2 * pairs), 1), hidden_size, dtype=dtype, requires_grad=True)
        labels = torch.empty(hidden.shape[:2], dtype=torch.int64)
    model, head = op.Model(hidden, op.LMHead(weight), dtype), op.LMHead(weight)
    call = op.Call(model, model, labels, None, None, False, (), "auto", memory_budget, op.Needs(True, trained, False))
    least, logits = directions.least_rows(torch.device(device)), 2 * grid.padded(head.widest)
    room = memory_budget // stats_dtype(model, model).itemsize
    if not trained:
        rows = min(directions.block_rows(room, head, least), tokens)
        return Way(f"dh is made in forward, {rows:,} tokens at a time", 3 + AGAIN * _missing(room, rows * logits))
    if most := groups.most_rows(call, least):
        again = _missing(most, tokens // pairs)  # a longer pair's are not all kept
        return Way(f"gradients are made in forward, pairs of up to {most:,} tokens at a time", 4 + AGAIN * again)
    missing = _missing(room, tokens * logits)
    words = "all logits are kept" if not missing else f"{1 - missing:.0%} of the logits are kept, others made again"
    return Way(words, 4 + AGAIN * missing)


def _missing(room: int, wanted: int) -> float:
    """Return the share of what is wanted that there is no room for."""
    return max(1 - room / max(wanted, 1), 0.0)
