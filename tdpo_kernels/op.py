"""`token_stats`: the differentiable primitive, and the library's only autograd function."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import checks
from .backends import choose
from .pack import pack
from .types import Backend, Inputs, LMHead, Model, Needs, Rows, TokenStats

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
    without ever holding ``[tokens, vocabulary]`` (backend ``"naive"`` excepted).

    Args:
        hidden: ``(..., L, D)`` last hidden states of the policy, or ``(N, D)`` packed with ``cu_seqlens``. fp16,
            bf16, fp32, fp64.
        head: ``(V, D)`` tensor, ``nn.Linear`` or `LMHead`, in hidden's dtype (or any under ``torch.autocast``).
        ref_hidden, ref_head: the same for the reference, ``(..., L, E)`` and ``(V, E)``; detached. E and the dtype
            may differ from the policy's.
        labels: ``(..., L)`` int64 or int32, aligned with the inputs.
        ignore_index: labels equal to it are dropped before any product. None: every label counts (no synchronisation
            on CUDA).
        shift: True: ``labels[..., t]`` is predicted by ``hidden[..., t - 1]``, and the first label of a sequence has no
            predictor. False: by ``hidden[..., t]``.
        cu_seqlens: ``(S + 1,)`` int32 or int64 offsets from 0 to N; the shift never crosses one.
        extras: names out of ``entropy``, ``mean_logit``, ``is_argmax``, computed for the policy in the same pass,
            detached.
        backend: ``"auto"``, ``"tiled"`` or ``"naive"``.
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
    policy = _model(hidden, head, "")
    reference = _model(ref_hidden.detach(), _detached(ref_head), "ref_")
    name, implementation = choose(backend, hidden.device)
    starts_S = cu_seqlens[:-1].long() if cu_seqlens is not None else _starts(labels)
    rows = pack(labels.reshape(-1), starts_S, head.weight.shape[0], ignore_index=ignore_index, shift=shift)
    call = _Call(implementation, Inputs(policy, reference, rows, memory_budget, tuple(extras)), torch.is_grad_enabled())
    logp, kl, ref_logp, *more = _TokenStats.apply(call, policy.hidden, head.weight, head.bias)
    logp, kl, ref_logp, *more = (x.view(labels.shape) for x in (logp, kl, ref_logp, *more))
    return TokenStats(logp, ref_logp, kl, dict(zip(extras, more, strict=True)))


@dataclass
class _Call:
    """What the autograd function needs besides its differentiable tensors."""

    backend: Backend
    inputs: Inputs
    grad_enabled: bool


class _TokenStats(torch.autograd.Function):
    """Tensors go through `save_for_backward`, so that torch notices when one is changed between forward and
    backward."""

    @staticmethod
    def forward(ctx, call: _Call, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None):
        inputs = call.inputs
        needs = Needs(*ctx.needs_input_grad[1:]) if call.grad_enabled else Needs(False, False, False)
        with _no_autocast(hidden_ND):
            out = call.backend.forward(inputs, needs)
        if needs:
            ctx.set_materialize_grads(False)
            ctx.backend = call.backend
            ctx.inputs = _without_tensors(inputs)
            _save(ctx, (*_tensors(inputs), *out.saved))
        count = hidden_ND.shape[0]
        logp, kl, ref_logp, *extras = (
            _spread(x, inputs.rows, count) for x in (out.logp_T, out.kl_T, out.ref_logp_T, *out.extras.values())
        )
        ctx.mark_non_differentiable(ref_logp, *extras)
        return logp, kl, ref_logp, *extras

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp: Tensor | None, g_kl: Tensor | None, *_: None):
        every = _saved(ctx)
        inputs, saved = _with_tensors(ctx.inputs, every[:_TENSORS]), every[_TENSORS:]
        needs = Needs(*ctx.needs_input_grad[1:])
        g_logp_T, g_kl_T = (g if g is None else _gather(g, inputs.rows) for g in (g_logp, g_kl))
        if g_logp_T is None and g_kl_T is None:
            return None, None, None, None
        with _no_autocast(inputs.policy.hidden):
            grads = ctx.backend.backward(inputs, needs, saved, g_logp_T, g_kl_T)
        return None, grads.hidden, grads.weight, grads.bias


def _save(ctx, tensors: tuple[Tensor | None, ...]) -> None:
    """Torch does not save inference tensors (they have no version to check); references often run in inference mode."""
    ctx.unversioned = {i: x for i, x in enumerate(tensors) if x is not None and x.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.unversioned else x for i, x in enumerate(tensors)))


def _saved(ctx) -> tuple[Tensor | None, ...]:
    return tuple(ctx.unversioned.get(i, x) for i, x in enumerate(ctx.saved_tensors))


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


def _with_tensors(inputs: Inputs, tensors: tuple[Tensor | None, ...]) -> Inputs:
    def side(model: Model, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Model:
        return Model(hidden, LMHead(weight, bias, model.head.logit_scale, model.head.softcap), model.dtype)

    policy, reference = side(inputs.policy, *tensors[:3]), side(inputs.reference, *tensors[3:6])
    return Inputs(policy, reference, Rows(*tensors[6:9]), inputs.memory_budget, inputs.extras)


def _without_tensors(inputs: Inputs) -> Inputs:
    return _with_tensors(inputs, (None,) * _TENSORS)


def _model(hidden: Tensor, head: LMHead, prefix: str) -> Model:
    return Model(hidden.reshape(-1, hidden.shape[-1]), head, checks.compute_dtype(hidden, head, prefix))


def _detached(head: LMHead) -> LMHead:
    return replace(head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())


def _starts(labels: Tensor) -> Tensor:
    """Where each padded sequence begins in the flattened labels."""
    length = max(labels.shape[-1], 1)
    return torch.arange(0, labels.numel(), length, device=labels.device)


def _spread(x_T: Tensor, rows: Rows, count: int) -> Tensor:
    return x_T if rows.label_T is None else x_T.new_zeros(count).index_copy_(0, rows.label_T, x_T)


def _gather(g: Tensor, rows: Rows) -> Tensor:
    return g if rows.label_T is None else g.index_select(0, rows.label_T)


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """The compute dtype was settled in `checks.compute_dtype`; nothing below may cast behind our back."""
    if not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
