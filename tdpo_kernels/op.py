"""`token_stats`: the differentiable primitive, and the library's only autograd function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import checks, registered
from .backends import choose
from .backends.sharded import Sharded
from .call import Call, lay_out
from .pack import pack
from .types import Inputs, LMHead, Model, Needs, Rows, TokenStats, VocabParallelHead

DEFAULT_BUDGET = 512 * 2**20


def token_stats(
    hidden: Tensor,
    head: Tensor | nn.Linear | LMHead,
    ref_hidden: Tensor,
    ref_head: Tensor | nn.Linear | LMHead,
    labels: Tensor,
    *,
    ignore_index: int | None = -100,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    extras: tuple[str, ...] = (),
    backend: str = "auto",
    memory_budget: int = DEFAULT_BUDGET,
) -> TokenStats:
    """Per-token policy log-probability, reference log-probability and KL(reference || policy) over the full vocabulary.

    Eqs. (1) and (2) of `tdpo_kernels.reference` (Zeng et al. 2024, arXiv 2404.11999), with gradients (6) and (7),
    without ever holding ``[tokens, vocabulary]`` (backend ``"naive"`` excepted). `torch.compile` takes it whole
    (``fullgraph=True``), as the operator ``tdpo_kernels::token_stats``, unless the head is split over ranks.

    Args:
        hidden: ``(..., L, D)`` last hidden states of the policy, or ``(N, D)`` packed with ``cu_seqlens``. fp16,
            bf16, fp32, fp64.
        head: ``(V, D)`` tensor, ``nn.Linear`` or `LMHead`, in hidden's dtype (or any under ``torch.autocast``); or what
            `tdpo_kernels.parallel.vocab_parallel` makes of one rank's rows.
        ref_hidden, ref_head: the same for the reference, ``(..., L, E)`` and ``(V, E)``; detached. E and the dtype
            may differ from the policy's.
        labels: ``(..., L)`` int64 or int32, aligned with the inputs.
        ignore_index: labels equal to it are dropped before any product. None: every label counts (then a padded call
            never waits for a CUDA device, and labels there are not checked to be in [0, V)).
        shift: True: ``labels[..., t]`` is predicted by ``hidden[..., t - 1]``, and the first label of a sequence has no
            predictor. False: by ``hidden[..., t]``.
        cu_seqlens: ``(S + 1,)`` int32 or int64 offsets from 0 to N; the shift never crosses one.
        extras: names out of ``entropy``, ``mean_logit``, ``is_argmax``, computed for the policy in the same pass,
            detached.
        backend: ``"auto"``, ``"fused"``, ``"tiled"`` or ``"naive"``.
        memory_budget: bytes that may be kept from forward to backward to save recomputation. Nothing is kept without
            grad.

    Returns:
        `TokenStats`, shaped like ``labels``, zero where ignored. ``logp`` and ``kl`` take independent per-token
        cotangents; gradients flow to ``hidden``, ``head.weight`` and ``head.bias``, in each one's dtype. Not twice
        differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was seen and what is wanted.
    """
    head, ref_head = checks.as_head(head, "head"), checks.as_head(ref_head, "ref_head")
    checks.check_inputs(hidden, head, ref_hidden, ref_head, labels)
    checks.check_options(ignore_index, shift, extras, memory_budget)
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, hidden)
    policy = Model(hidden, head, checks.compute_dtype(hidden, head, ""))
    reference = Model(
        _detached(ref_hidden), _detached_head(ref_head), checks.compute_dtype(ref_hidden, ref_head, "ref_")
    )
    compute = _statistics
    if torch.compiler.is_compiling():  # a graph ends before collectives of a group's own, and begins anew after them
        split = isinstance(head, VocabParallelHead)
        compute = torch.compiler.disable(_statistics) if split else registered.statistics
    logp, kl, ref_logp, *more = compute(
        policy, reference, labels, cu_seqlens, ignore_index=ignore_index, shift=shift, extras=tuple(extras),
        backend=backend, memory_budget=memory_budget,
    )  # fmt: skip
    return TokenStats(logp, ref_logp, kl, dict(zip(extras, more, strict=True)))


def _statistics(
    policy: Model, reference: Model, labels: Tensor, cu_seqlens: Tensor | None, *, ignore_index: int | None,
    shift: bool, extras: tuple[str, ...], backend: str, memory_budget: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`registered.statistics`, without what an operator's dispatch costs a small call."""
    _, implementation = choose(backend, policy.hidden.device, (policy, reference))
    if isinstance(policy.head, VocabParallelHead):
        implementation = Sharded(implementation)
    rows = pack(labels, cu_seqlens, policy.head.vocab, ignore_index=ignore_index, shift=shift)
    detached = Model(_detached(policy.hidden), policy.head, policy.dtype)
    call = lay_out(implementation, detached, reference, rows, memory_budget, extras=extras)
    return _TokenStats.apply(call, torch.is_grad_enabled(), policy.hidden, policy.head.weight, policy.head.bias)


class _TokenStats(torch.autograd.Function):
    """Tensors go through `save_for_backward`, so that torch notices when one is changed between forward and
    backward."""

    @staticmethod
    def forward(ctx, call: Call, grad_enabled: bool, hidden: Tensor, weight_VD: Tensor, bias_V: Tensor | None):
        needs = Needs(*ctx.needs_input_grad[2:]) if grad_enabled else Needs(False, False, False)
        out = call.forward(needs)
        if needs:
            ctx.set_materialize_grads(False)
            ctx.refilled = _emptied(call)
            _save(ctx, (*_tensors(call.inputs), *out.saved))
        logp, kl, *others = call.statistics(out)
        ctx.mark_non_differentiable(*others)
        return logp, kl, *others

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp: Tensor | None, g_kl: Tensor | None, *_: None):
        every = _saved(ctx)
        call = ctx.refilled(*every[:_TENSORS])
        grads = call.backward(Needs(*ctx.needs_input_grad[2:]), every[_TENSORS:], g_logp, g_kl)
        return None, None, grads.hidden, grads.weight, grads.bias


def _save(ctx, tensors: tuple[Tensor | None, ...]) -> None:
    """Torch does not save inference tensors (they have no version to check); references often run in inference mode."""
    ctx.unversioned = {i: x for i, x in enumerate(tensors) if x is not None and x.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.unversioned else x for i, x in enumerate(tensors)))


def _saved(ctx) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    return tuple(ctx.unversioned.get(i, x) for i, x in enumerate(saved)) if ctx.unversioned else saved


_TENSORS = 9


def _tensors(inputs: Inputs) -> tuple[Tensor | None, ...]:
    sides = (inputs.policy, inputs.reference)
    rows = inputs.rows
    return (
        *(x for s in sides for x in (s.hidden, s.head.weight, s.head.bias)),
        rows.hidden_T,
        rows.label_T,
        rows.labels_T,
    )


def _emptied(call: Call) -> Callable[..., Call]:
    """The call as a function of its `_tensors`, which it does not hold."""
    backend, shape, steps, inputs = call.backend, call.shape, call.steps, call.inputs
    budget, extras = inputs.memory_budget, inputs.extras
    kinds = [(type(side.head), _options(side.head), side.dtype) for side in (inputs.policy, inputs.reference)]

    def refilled(*tensors: Tensor | None) -> Call:
        sides = (
            Model(hidden, head(weight=weight, bias=bias, **options), dtype)
            for (hidden, weight, bias), (head, options, dtype) in zip((tensors[:3], tensors[3:6]), kinds, strict=True)
        )
        return Call(backend, Inputs(*sides, Rows(*tensors[6:]), budget, extras), shape, steps)

    return refilled


def _options(head: LMHead) -> dict[str, Any]:
    """All that a head is but weight and bias."""
    return {name: getattr(head, name) for name in _option_names(type(head))}


@cache
def _option_names(kind: type[LMHead]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind) if field.name not in ("weight", "bias"))


def _detached(x: Tensor | None) -> Tensor | None:
    return x.detach() if x is not None and x.requires_grad else x


def _detached_head(head: LMHead) -> LMHead:
    weight, bias = _detached(head.weight), _detached(head.bias)
    return head if weight is head.weight and bias is head.bias else replace(head, weight=weight, bias=bias)
