"""Batches without padding: the sequences of a batch follow one another in a single row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UsageError
from .head import family, run_backbone
from .redirect import evaluating, redirect
from .step import Batch

TAKEN = {"input_ids", "attention_mask", "completion_mask", "ref_hidden"}
CLOSE, IN_EPS = 1e-4, 8  # of the largest hidden state: what rounding may make of the same sequence, and in eps


def packed(batch: Batch) -> dict[str, Tensor]:
    """Return a padded batch ``(2P, L)`` as one row ``(1, N)`` of its N tokens, chosen sequences first.

    ``position_ids (1, N)`` begin anew with each sequence, by which transformers tells sequences apart; ``cu_seqlens``
    ``(2P + 1,)`` int32 are the offsets at which they begin, and N. There is no ``attention_mask``.

    Raises:
        UsageError: the batch has more than text.
    """
    if others := set(batch) - TAKEN - {"ref_chosen_logps", "ref_rejected_logps"}:
        raise UsageError(f"padding_free: got a batch with {', '.join(sorted(others))}, wanted text alone, or False")
    there = batch["attention_mask"].bool()
    row = {name: batch[name][there][None] for name in ("input_ids", "completion_mask", "ref_hidden") if name in batch}
    row["position_ids"] = (there.cumsum(-1) - 1)[there][None]
    return row | {"cu_seqlens": F.pad(there.sum(-1).cumsum(0), (1, 0)).to(torch.int32)}


@torch.no_grad()
def check_packing(model: nn.Module, inputs: Mapping[str, Any], cu_seqlens: Tensor, wrapped: nn.Module) -> None:
    """Compare the last sequence's hidden states in a packed row with those that it has alone.

    Under a wrapper every process has to call this.

    Raises:
        UsageError: they differ, because the model's attention (or state) goes beyond a sequence's beginning.
    """
    start = int(cu_seqlens[-2])
    alone = {name: x[:, start:] for name, x in inputs.items()}
    with evaluating(model):
        beside, by_itself = (
            redirect(wrapped, model, lambda **given: run_backbone(model, **given).last, **given)
            for given in (inputs, alone)
        )
    beside, by_itself = beside[:, start:].float(), by_itself.float()
    apart, size = float((beside - by_itself).abs().max()), float(by_itself.abs().max())
    if not apart <= max(CLOSE, IN_EPS * torch.finfo(model.dtype).eps) * size:
        raise UsageError(
            f"padding_free: got True for {family(model)} with attn_implementation "
            f"{getattr(model.config, '_attn_implementation', None)!r}, in which a sequence sees the one before it in "
            f"its row: hidden states off by {apart / size:.2g} of the largest; wanted False, or another attention"
        )
