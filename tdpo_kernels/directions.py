"""Compute dh of a frozen head before the loss is known: in 3 products, at the memory of a block of rows.

A row's g_kl is a known multiple of its g_logp whatever the loss: 0 for the chosen rows of TDPO2 and alpha for its
rejected ones, 1 for all rows of TDPO1. So ``dh = g_logp u``, where the direction ``u = dz W`` is of the cotangents (1,
ratio). Rows go block by block: forward, then at once backward from the logits kept, so that none are made twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import grid, rowmath
from .types import Inputs, Rows

LEAST = {"cpu": 256, "cuda": 1024}  # rows that are worth the launches of a block


def run(
    inputs: Inputs,
    ratio_T: Tensor,
    kept: Tensor,
    statistics: Callable[[Inputs], rowmath.Whole],
    gradient: Callable[[Inputs, Tensor], Tensor],
) -> tuple[rowmath.Whole, Tensor]:
    """Return the statistics of all rows, and u ``(N, D)`` in the dtype of the hidden states.

    Args:
        kept: room for the logits of a block.
        statistics, gradient: functions of a block of rows, which share `kept`; `gradient` returns dh unrounded.
    """
    hidden, T = inputs.policy.hidden, inputs.rows.count
    vocab = grid.padded(inputs.policy.head.weight.shape[0])
    each = max(LEAST.get(hidden.device.type, LEAST["cpu"]), kept.numel() // max(2 * vocab, 1))
    u_ND = hidden.new_zeros(hidden.shape[:-1].numel(), hidden.shape[-1])
    found = []
    for a in range(0, max(T, 1), each):
        block = replace(inputs, rows=_block(inputs.rows, slice(a, min(a + each, T))))
        found.append(statistics(block))
        ratio_R = ratio_T[a : a + each]
        row = rowmath.cotangents(found[-1].row, torch.ones_like(ratio_R), ratio_R, inputs.policy.head.logit_scale)
        dh = gradient(block, row).to(u_ND.dtype)
        index = block.rows.hidden_T
        u_ND = dh if index is None else u_ND.index_copy_(0, index, dh)
    return _joined(found), u_ND


def _block(rows: Rows, block: slice) -> Rows:
    if grid.size(block) == rows.count:
        return rows
    every = torch.arange(block.start, block.stop, device=rows.labels_T.device)
    hidden_T, label_T = (every if x is None else x[block] for x in (rows.hidden_T, rows.label_T))
    return Rows(hidden_T, label_T, rows.labels_T[block])


def _joined(found: list[rowmath.Whole]) -> rowmath.Whole:
    if len(found) == 1:
        return found[0]
    logp, ref_logp, kl, _, row = (torch.cat(x, -1) if isinstance(x[0], Tensor) else x for x in zip(*found, strict=True))
    extras = {name: torch.cat([x.extras[name] for x in found]) for name in found[0].extras}
    return rowmath.Whole(logp, ref_logp, kl, extras, row)


def ratio_of(
    rows: Rows, labels: Tensor, cu_seqlens: Tensor | None, ratios: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """Return each row's g_kl / g_logp ``(T,)``, from the `ratios` of the sequences' first and second half."""
    at_T = torch.arange(labels.numel(), device=labels.device) if rows.label_T is None else rows.label_T
    if cu_seqlens is None:
        sequence_T, count = at_T // max(labels.shape[-1], 1), labels.shape[0]
    else:
        sequence_T, count = torch.bucketize(at_T, cu_seqlens[1:].long(), right=True), cu_seqlens.numel() - 1
    chosen, rejected = (torch.tensor(x, dtype=dtype, device=labels.device) for x in ratios)
    return torch.where(sequence_T < count // 2, chosen, rejected)


def along(u: Tensor, counts: Tensor, g_logp: Tensor, shift: bool) -> Tensor:
    """Return ``dh = g_logp u``, each label's cotangent at the hidden state that predicts it.

    counts: 1 for labels that count and 0 for others, whose cotangents may be anything.
    """
    g_N = torch.where(counts.reshape(-1) > 0, g_logp.reshape(-1), 0.0)
    g_N = F.pad(g_N[1:], (0, 1)) if shift else g_N
    return (u.reshape(-1, u.shape[-1]) * g_N[:, None]).to(u.dtype).view(u.shape)
