"""Compute dh of a frozen head before the loss is known: in 3 products, at the memory of a block of rows.

A row's g_kl is a known multiple of its g_logp whatever the loss: 0 for the chosen rows of TDPO2 and alpha for its
rejected ones, 1 for all rows of TDPO1. So ``dh = g_logp u``, where the direction ``u = dz W`` is of the cotangents (1,
ratio). Rows go block by block: forward, then at once backward from the logits kept, so that none are made twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import engine, pack
from .backends import grid, rowmath
from .types import SUMMANDS, Inputs, LMHead, Needs

LEAST = {"cpu": 256, "cuda": 1024}  # rows that are worth the launches of a block


def run(
    inputs: Inputs, ratio_T: Tensor, kept: Tensor, room: int, backend: str, needs: Needs
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the statistics of all rows ``(F, T)``, and u ``(N, D)`` in the dtype of the hidden states.

    kept: for the logits of a block; room: how many logits the budget holds, alike on all ranks of a split vocabulary,
    which cut rows alike.
    """
    hidden, head, T = inputs.policy.hidden, inputs.policy.head, inputs.rows.count
    each = block_rows(room, head, least_rows(hidden.device))
    u_ND = hidden.new_zeros(hidden.shape[:-1].numel(), hidden.shape[-1])
    found = []
    for a in range(0, max(T, 1), each):
        block = replace(inputs, rows=pack.subset(inputs.rows, slice(a, min(a + each, T))))
        shown, row = engine.statistics(block, backend, needs, kept)
        ratio_R = ratio_T[a : a + each]
        row = rowmath.cotangents(row, torch.ones_like(ratio_R), ratio_R, head.logit_scale)
        dh = engine.gradients(block, backend, needs, kept, row, SUMMANDS).hidden.to(u_ND.dtype)
        index, found = block.rows.hidden_T, [*found, shown]
        u_ND = dh if index is None else u_ND.index_copy_(0, index, dh)
    return torch.cat(found, -1), u_ND


def least_rows(device: torch.device) -> int:
    return LEAST.get(device.type, LEAST["cpu"])


def block_rows(room: int, head: LMHead, least: int) -> int:
    """Return how many rows go together where there is room for so many logits."""
    return max(least, room // max(2 * grid.padded(head.widest), 1))


def ratio_of(sequence_T: Tensor, count: int, ratios: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return each row's g_kl / g_logp ``(T,)``, from the `ratios` of the first and the second half of all sequences."""
    chosen, rejected = (torch.tensor(x, dtype=dtype, device=sequence_T.device) for x in ratios)
    return torch.where(sequence_T < count // 2, chosen, rejected)


def along(u: Tensor, counts: Tensor, g_logp: Tensor, shift: bool) -> Tensor:
    """Return ``dh = g_logp u``, each label's cotangent at the hidden state that predicts it.

    counts: 1 for labels that count and 0 for others, whose cotangents may be anything.
    """
    g_N = torch.where(counts.reshape(-1) > 0, g_logp.reshape(-1), 0.0)
    g_N = F.pad(g_N[1:], (0, 1)) if shift else g_N
    return (u.reshape(-1, u.shape[-1]) * g_N[:, None]).to(u.dtype).view(u.shape)
