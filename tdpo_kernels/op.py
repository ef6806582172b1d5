"""Compute `token_stats`: one autograd function on one operator each way, eager or compiled."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import checks, directions, engine, pack
from .backends import BACKENDS, choose, grid, rowmath
from .types import Extras, LMHead, Model, Needs, Rows, TokenStats, VocabParallelHead, stats_dtype

DEFAULT_BUDGET = 2**30


def token_stats(
    hidden: Tensor, head: Tensor | nn.Linear | LMHead, ref_hidden: Tensor, ref_head: Tensor | nn.Linear | LMHead,
    labels: Tensor, *, ignore_index: int | None = -100, shift: bool = True, cu_seqlens: Tensor | None = None,
    extras: tuple[str, ...] = (), backend: str = "auto", memory_budget: int = DEFAULT_BUDGET,
) -> TokenStats:  # fmt: skip
    """Return each token's policy and reference log-probability and KL(reference || policy) over the full vocabulary.

    These are eqs. (1) and (2) of `tdpo_kernels.reference` (Zeng et al. 2024, arXiv 2404.11999), with gradients (6) and
    (7), without ever holding ``[tokens, vocabulary]`` (backend ``"naive"`` excepted). `torch.compile` takes it whole
    (``fullgraph=True``), as the operator ``tdpo_kernels::token_stats``, unless the head is split over ranks.

    Args:
        hidden: ``(..., L, D)`` last hidden states of the policy, or ``(N, D)`` packed with ``cu_seqlens``. fp16,
            bf16, fp32, fp64.
        head: ``(V, D)`` tensor, ``nn.Linear`` or `LMHead`, in hidden's dtype (or any under ``torch.autocast``); or the
            head that `tdpo_kernels.parallel.vocab_parallel` returns.
        ref_hidden, ref_head: those of the reference model, ``(..., L, E)`` and ``(V, E)``; detached. E and the dtype
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
        TypeError, ValueError: if an argument is wrong; the message says which, what was seen and what is wanted.
    """
    call = checked(
        hidden, head, ref_hidden, ref_head, labels, ignore_index=ignore_index, shift=shift, cu_seqlens=cu_seqlens,
        extras=extras, backend=backend, memory_budget=memory_budget,
    )  # fmt: skip
    return statistics(call)


class Call(NamedTuple):
    """Hold what `token_stats` was given, checked."""

    policy: Model
    reference: Model
    labels: Tensor
    cu_seqlens: Tensor | None
    ignore_index: int | None
    shift: bool
    extras: Extras
    backend: str
    memory_budget: int
    needs: Needs


def checked(
    hidden: Tensor, head: Tensor | nn.Linear | LMHead, ref_hidden: Tensor, ref_head: Tensor | nn.Linear | LMHead,
    labels: Tensor, *, ignore_index: int | None, shift: bool, cu_seqlens: Tensor | None, extras: Extras, backend: str,
    memory_budget: int,
) -> Call:  # fmt: skip
    """Return the call, or raise the errors that `token_stats` documents."""
    checks.check_transforms(hidden)
    head, ref_head = checks.as_head(head, "head"), checks.as_head(ref_head, "ref_head")
    checks.check_inputs(hidden, head, ref_hidden, ref_head, labels)
    checks.check_options(ignore_index, shift, extras, memory_budget)
    checks.check_backend(backend, BACKENDS)
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, hidden)
    policy = Model(hidden, head, checks.compute_dtype(hidden, head, ""))
    reference = Model(ref_hidden, ref_head, checks.compute_dtype(ref_hidden, ref_head, "ref_"))
    needs = (torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, head.weight, head.bias))
    budget = min(int(memory_budget), 2**62) if backend != "naive" else 2**62
    ignored = None if ignore_index is None else int(ignore_index)
    return Call(policy, reference, labels, cu_seqlens, ignored, shift, tuple(extras), backend, budget, Needs(*needs))


def statistics(call: Call, ratios: tuple[float, ...] = ()) -> TokenStats:
    """Return `token_stats`; `ratios`: g_kl / g_logp of the first and the second half of the sequences, if known."""
    (hidden, head, dtype), (ref_hidden, ref_head, ref_dtype) = call.policy, call.reference
    needs = list(call.needs)
    room = [rowmath.WHOLE, _room(call) if any(needs) else 0]  # sizes of outputs
    ratios = list(ratios) if needs == [True, False, False] else []
    options = (*_options(head, dtype), *_options(ref_head, ref_dtype), call.shift, call.backend, needs)
    logp, kl, ref_logp, extra = _TokenStats.apply(
        hidden, head.weight, head.bias, ref_hidden.detach(), ref_head.weight.detach(), _detached(ref_head.bias),
        call.labels, call.cu_seqlens, call.ignore_index, list(call.extras), ratios, room, options,
    )  # fmt: skip
    return TokenStats(logp, ref_logp, kl, dict(zip(call.extras, extra.unbind(), strict=True)))


def _room(call: Call) -> int:
    """Return how many logits may be kept if every row counts, because a graph has shapes before it sees a label."""
    N, itemsize = call.labels.numel(), stats_dtype(call.policy, call.reference).itemsize
    return grid.room(N, call.policy.head.widest, itemsize, call.memory_budget)


class _TokenStats(torch.autograd.Function):
    """Save what backward needs in torch's own way, so that it notices a change of a tensor in between."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, ignore_index, extras, ratios, room, options = arguments
        run = _forward_op if torch.compiler.is_compiling() else _forward
        logp, kl, ref_logp, extra, u, *kept = run(*tensors, ignore_index, extras, ratios, room, *options)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(ref_logp, extra)
        if any(options[-1]):
            ctx.options, ctx.along = options, bool(ratios)
            _save(ctx, (u, kept[0]) if ratios else (*tensors[:_MODELS], *kept))
        return logp, kl, ref_logp, extra

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logp: Tensor | None, g_kl: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        grads = (None,) * 3
        if ctx.along:
            grads = (None if g_logp is None else directions.along(*_saved(ctx), g_logp, ctx.options[-3]), None, None)
        elif g_logp is not None or g_kl is not None:
            run = _backward_op if torch.compiler.is_compiling() else _backward
            grads = run(*_saved(ctx), g_logp, g_kl, *ctx.options)
        wanted = (g if need else None for g, need in zip(grads, ctx.options[-1], strict=True))
        return *wanted, *(None,) * (_ARGUMENTS - 3)


_MODELS = 6  # hidden, weight and bias of both models come first
_ARGUMENTS = _MODELS + 7


def _save(ctx: Any, tensors: tuple[Tensor | None, ...]) -> None:
    """Save the tensors. Inference tensors, which references often are, have no version and are held as they are."""
    ctx.unversioned = {}
    if not torch.compiler.is_compiling():
        ctx.unversioned = {i: x for i, x in enumerate(tensors) if x is not None and x.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.unversioned else x for i, x in enumerate(tensors)))


def _saved(ctx: Any) -> list[Tensor | None]:
    return [ctx.unversioned.get(i, x) for i, x in enumerate(ctx.saved_tensors)]


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


# --- the operators: graphs call them, eager calls go to `_forward` and `_backward` directly ---------------------------

_TENSORS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias"
_OPTIONS = ", ".join(
    f"float {side}scale, float? {side}softcap, ScalarType {side}dtype, str {side}group, SymInt[] {side}sizes"
    for side in ("", "ref_")
)
_SHARED = f"{_OPTIONS}, bool shift, str backend, bool[] needs"
_SAVED = "Tensor row, Tensor index, Tensor count, Tensor kept"
FORWARD = (
    f"({_TENSORS}, Tensor labels, Tensor? cu_seqlens, SymInt? ignore_index, str[] extras, float[] ratios, "
    f"SymInt[] room, {_SHARED}) -> (Tensor logp, Tensor kl, Tensor ref_logp, Tensor extra, Tensor u, {_SAVED})"
)
BACKWARD = (
    f"({_TENSORS}, {_SAVED}, Tensor? g_logp, Tensor? g_kl, {_SHARED}) -> (Tensor hidden, Tensor weight, Tensor bias)"
)
_EACH = 5  # options of a model
TAGS = (torch.Tag.cudagraph_unsafe,)  # packing waits for the device


def _options(head: LMHead, dtype: torch.dtype) -> tuple:
    """Return the options of a model that an operator takes beside its tensors."""
    split = isinstance(head, VocabParallelHead)
    return head.logit_scale, head.softcap, dtype, *((head.group.group_name, list(head.sizes)) if split else ("", []))


def _model(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: tuple) -> Model:
    scale, softcap, dtype, name, sizes = options
    if name:
        group = dist.distributed_c10d._resolve_process_group(name)
        return Model(hidden, VocabParallelHead(weight, bias, scale, softcap, group, tuple(sizes)), dtype)
    return Model(hidden, LMHead(weight, bias, scale, softcap), dtype)


def _models(tensors: tuple, options: tuple) -> tuple[Model, Model]:
    return _model(*tensors[:3], options[:_EACH]), _model(*tensors[3:], options[_EACH : 2 * _EACH])


def _forward(*args: Any, fixed: bool = False) -> tuple[Tensor, ...]:
    """Return what `FORWARD` says; where shapes need not be `fixed`, only the rows that count are kept."""
    labels, cu_seqlens, ignore_index, extras, ratios, room, *options, shift, backend, needs = args[_MODELS:]
    policy, reference = _models(args[:_MODELS], options)
    choose(backend, policy.hidden.device, (policy, reference))  # refused before any work
    rows = pack.pack(labels, cu_seqlens, policy.head.vocab, ignore_index=ignore_index, shift=shift)
    inputs, needs = engine.inputs_of(policy, reference, rows, tuple(extras)), Needs(*needs)
    size = room[1] if fixed else grid.room(rows.count, policy.head.weight.shape[0], 1, room[1])
    kept, u = grid.memory_for(size, labels, inputs.stats_dtype), policy.hidden.new_empty(0)
    if ratios:
        count = labels.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        sequence_T = pack.sequences(rows, labels.shape, cu_seqlens)
        ratio_T = directions.ratio_of(sequence_T, count, ratios, inputs.stats_dtype)
        found_FT, u = directions.run(inputs, ratio_T, kept, room[1], backend, needs)
        u, kept = u.view(policy.hidden.shape), kept[:0].clone()
        counts = pack.spread(torch.ones_like(found_FT[0]), rows, labels.shape).view(1, -1)
        saved = counts, rows.labels_T.new_zeros(2, labels.numel()), torch.tensor(rows.count, device="cpu")
    else:
        found_FT, row = engine.statistics(inputs, backend, needs, kept)
        saved = _sized(row, rows, labels.numel())
    logp, kl, ref_logp, *extra = (pack.spread(x_T, rows, labels.shape) for x_T in found_FT)
    extra = torch.stack(extra) if extra else logp.new_empty(0, *logp.shape)
    return logp, kl, ref_logp, extra, u, *saved, kept


_forward_op = torch.library.custom_op(
    "tdpo_kernels::token_stats", partial(_forward, fixed=True), mutates_args=(), schema=FORWARD, tags=TAGS
)


def _sized(row: Tensor, rows: Rows, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return row values, positions and labels of the T rows that count, padded to the size of all rows, and T."""
    T, index = rows.count, rows.labels_T.new_zeros(2, count)
    if rows.label_T is not None:
        index[0, :T] = rows.label_T
        row = torch.nn.functional.pad(row, (0, count - T))
    index[1, :T] = rows.labels_T
    return row, index, torch.tensor(T, device="cpu")


@_forward_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    labels, _, _, extras, ratios, room, *options, _, backend, _ = args[_MODELS:]
    policy, reference = _models(args[:_MODELS], options)
    choose(backend, policy.hidden.device, (policy, reference))  # refused now rather than when it runs
    dtype, N = stats_dtype(policy, reference), labels.numel()
    shapes = (labels.shape, labels.shape, labels.shape, (len(extras), *labels.shape), (1 if ratios else room[0], N))
    index, count = labels.new_empty(2, N, dtype=torch.int64), torch.empty((), dtype=torch.int64, device="cpu")
    *shown, row = (labels.new_empty(x, dtype=dtype) for x in shapes)
    u, room = (policy.hidden.shape, 0) if ratios else ((0,), room[1])
    return *shown, policy.hidden.new_empty(u), row, index, count, labels.new_empty(room, dtype=dtype)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    row, index, count, kept, g_logp, g_kl, *options, shift, backend, needs = args[_MODELS:]
    policy, reference = _models(args[:_MODELS], options)
    T, needs = int(count), Needs(*needs)
    rows = pack.rows_of(*index[:, :T], index.shape[1], shift)
    inputs = engine.inputs_of(policy, reference, rows)
    g_logp_T, g_kl_T = (None if g is None else pack.gather(g, rows) for g in (g_logp, g_kl))
    row = rowmath.cotangents(row[:, :T], g_logp_T, g_kl_T, policy.head.logit_scale)
    dh, dw, db = engine.gradients(inputs, backend, needs, kept, row)
    dh = None if dh is None else dh.view(policy.hidden.shape)
    return tuple(args[0].new_empty(0) if g is None else g for g in (dh, dw, db))  # an operator returns no None


def _contiguous(*args: Any) -> tuple[Tensor, ...]:
    """Return the gradients in a layout that a graph knows beforehand."""
    return tuple(x.contiguous() for x in _backward(*args))


_backward_op = torch.library.custom_op(
    "tdpo_kernels::token_stats_backward", _contiguous, mutates_args=(), schema=BACKWARD, tags=TAGS
)


@_backward_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    none = args[0].new_empty(0)
    return tuple(x.new_empty(x.shape) if need else none.clone() for x, need in zip(args[:3], args[-1], strict=True))
