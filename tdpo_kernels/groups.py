"""Compute the loss with a trained head a group of pairs at a time: in 4 products, at the memory of one group's logits.

A pair's loss couples its own two completions only. So forward already makes the gradients of a group, for an upstream
gradient of 1 and from the group's own logits, which are made once: dh is written, dW is added up in place. Backward
multiplies them by the upstream gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import engine, pack
from .backends import grid, rowmath
from .directions import least_rows
from .loss import sequence_sums
from .op import Call
from .types import Gradients, Inputs, Model, Rows, TokenStats, stats_dtype


class Plan(NamedTuple):
    """Say which pairs go together."""

    rows: Rows
    counts_S: list[int]  # rows of each sequence
    groups: list[slice]  # of pairs
    room: int  # logits that may be kept


def plan(call: Call) -> Plan | None:
    """Return how pairs are grouped, or None where all rows are better computed as one."""
    most = most_rows(call, least_rows(call.policy.hidden.device))
    if most is None:
        return None
    ignoring = dict(ignore_index=call.ignore_index, shift=call.shift)
    rows = pack.pack(call.labels, call.cu_seqlens, call.policy.head.vocab, **ignoring)
    counts_S = pack.counts(rows, call.labels.shape, call.cu_seqlens).tolist()
    return Plan(rows, counts_S, _groups(counts_S, most), _room(call))


def most_rows(call: Call, least: int) -> int | None:
    """Return how many rows a group may have, or None where all rows are better computed as one.

    That is so where the head is not trained, where there is one pair, where the budget holds all logits anyway or those
    of fewer than `least` rows, where a graph is traced or captured, and in fp16, in which gradients want a scaled loss.
    """
    policy = call.policy
    if not (call.needs.weight or call.needs.bias) or policy.dtype == torch.float16 or torch.compiler.is_compiling():
        return None
    if policy.hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    most = _room(call) // (2 * grid.padded(policy.head.widest))
    S = call.labels.shape[0] if call.cu_seqlens is None else call.cu_seqlens.numel() - 1
    return most if S > 2 and least <= most < call.labels.numel() else None


def _room(call: Call) -> int:
    """Return how many logits may be kept beside the sum of a 16-bit dW, which is made apart."""
    head, dtype = call.policy.head, stats_dtype(call.policy, call.reference)
    apart = call.needs.weight and head.weight.dtype != dtype
    return call.memory_budget // dtype.itemsize - (head.widest * head.weight.shape[1] if apart else 0)


def _groups(counts_S: list[int], most: int) -> list[slice]:
    """Return slices of pairs in order, each of as many pairs as have at most `most` rows together, or of one."""
    P, groups, first, held = len(counts_S) // 2, [], 0, 0
    for i in range(P):
        n = counts_S[i] + counts_S[P + i]
        if held and held + n > most:
            groups.append(slice(first, i))
            first, held = i, 0
        held += n
    return [*groups, slice(first, P)]


@torch.no_grad()
def run(
    call: Call, plan: Plan, gradient: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[TokenStats, Gradients]:
    """Return the statistics, and the gradients for an upstream gradient of 1.

    gradient: a function of sums of logp, ref_logp and kl over sequences ``(2p,)``, and of their numbers of tokens, to
        the gradients of the loss in the sums of logp and of kl.
    """
    policy, (rows, counts_S, groups, room) = call.policy, plan
    inputs = engine.inputs_of(policy, call.reference, rows, call.extras)
    totals = _Totals(call, inputs)
    ends, P = [0, *accumulate(counts_S)], len(counts_S) // 2
    largest = max(sum(counts_S[g]) + sum(counts_S[g.start + P : g.stop + P]) for g in groups)
    room = grid.room(largest, policy.head.weight.shape[0], 1, room)
    kept = grid.memory_for(room, totals.shown, inputs.stats_dtype)
    for pairs in groups:
        sides = pairs, slice(pairs.start + P, pairs.stop + P)
        blocks = [slice(ends[s.start], ends[s.stop]) for s in sides]
        part = replace(inputs, rows=pack.subset(rows, *blocks))
        shown, row = engine.statistics(part, call.backend, call.needs, kept)
        g_logp_T, g_kl_T = _per_row(shown[:3], [n for s in sides for n in counts_S[s]], gradient)
        row = rowmath.cotangents(row, g_logp_T, g_kl_T, policy.head.logit_scale)
        dh = engine.gradients(part, call.backend, call.needs, kept, row, totals.heads).hidden
        totals.take(part.rows.hidden_T, blocks, shown, dh)
    logp, kl, ref_logp, *extras = (pack.spread(x_T, rows, call.labels.shape) for x_T in totals.shown)
    return TokenStats(logp, ref_logp, kl, dict(zip(call.extras, extras, strict=True))), totals.gradients(policy)


class _Totals:
    """Collect what groups make: their rows' statistics and dh, and the sums of dW and db."""

    def __init__(self, call: Call, inputs: Inputs) -> None:
        hidden, head, dtype = call.policy.hidden, call.policy.head, inputs.stats_dtype
        self.shown = hidden.new_empty(3 + len(call.extras), inputs.rows.count, dtype=dtype)
        self.hidden = hidden.new_zeros(call.labels.numel(), hidden.shape[-1]) if call.needs.hidden else None
        weight, bias = (
            hidden.new_zeros(x.shape, dtype=dtype) if need else None
            for x, need in ((head.weight, call.needs.weight), (head.bias, call.needs.bias))
        )
        self.heads = Gradients(None, weight, bias)

    def take(self, index: Tensor | None, blocks: list[slice], shown: Tensor, dh: Tensor | None) -> None:
        for block, x in zip(blocks, shown.split([grid.size(b) for b in blocks], -1), strict=True):
            self.shown[:, block] = x
        if dh is not None and index is None:
            self.hidden.copy_(dh)
        elif dh is not None:
            self.hidden.index_copy_(0, index, dh.to(self.hidden.dtype))

    def gradients(self, policy: Model) -> Gradients:
        hidden = None if self.hidden is None else self.hidden.view(policy.hidden.shape)
        weight, bias = (None if x is None else x.to(policy.head.weight.dtype) for x in self.heads[1:])
        return Gradients(hidden, weight, bias)


def _per_row(
    shown_3T: Tensor, counts: list[int], gradient: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """Return each row's gradients of the loss in logp and in kl, which are those of its sequence's sums."""
    offsets = torch.tensor([0, *accumulate(counts)], device=shown_3T.device)
    logp_S, kl_S, ref_S = sequence_sums(shown_3T, offsets)
    count_S, T = offsets.diff(), shown_3T.shape[-1]
    found = gradient(logp_S, ref_S, kl_S, count_S)
    return [g_S.to(shown_3T.dtype).repeat_interleave(count_S, output_size=T) for g_S in found]


class Given(torch.autograd.Function):
    """Return a loss whose gradients are known: those given, times the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: Gradients, *_: Tensor | None) -> Tensor:
        ctx.save_for_backward(*grads)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if _keeps_graph():
            scaled = (None if x is None else (x * g).to(x.dtype) for x in ctx.saved_tensors)
        else:  # nobody comes again, and dW is large
            scaled = (None if x is None else x.mul_(g) for x in ctx.saved_tensors)
        return None, None, *scaled


def _keeps_graph() -> bool:
    """Return whether backward runs with ``retain_graph``, as far as this torch tells."""
    return getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
