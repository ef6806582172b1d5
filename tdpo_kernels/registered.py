"""The call as two operators, ``tdpo_kernels::token_stats`` and its backward, for what `torch.compile` traces.

A compiled graph wants every shape before a label is seen. So packing happens inside the operator, statistics come in
the labels' shape, and what backward wants back lies in one flat buffer (`Kept`), whose size follows from shapes and
budget as if every row counted. Eager calls do without: see `op.py`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import choose, one_tile
from .backends.products import SIXTEEN_BIT
from .call import lay_out
from .pack import pack
from .types import LMHead, Model, Needs, Rows, stats_dtype

_MODELS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias"
_OPTIONS = (
    "float logit_scale, float? softcap, ScalarType dtype, float ref_logit_scale, float? ref_softcap, "
    "ScalarType ref_dtype, bool shift, str backend, bool[] needs"
)
FORWARD = (
    f"({_MODELS}, Tensor labels, Tensor? cu_seqlens, SymInt? ignore_index, str[] extras, SymInt row_bytes, "
    f"SymInt stage_bytes, {_OPTIONS}) "
    "-> (Tensor logp, Tensor kl, Tensor ref_logp, Tensor extra, Tensor kept, Tensor where)"
)
BACKWARD = (
    f"({_MODELS}, Tensor kept, Tensor where, Tensor? g_logp, Tensor? g_kl, {_OPTIONS}) "
    "-> (Tensor hidden, Tensor weight, Tensor bias)"
)
_M, _O = _MODELS.count(",") + 1, _OPTIONS.count(",") + 1  # how many arguments these are
TAGS = (torch.Tag.cudagraph_unsafe,)  # packing waits for the device


def statistics(
    policy: Model, reference: Model, labels: Tensor, cu_seqlens: Tensor | None, *, ignore_index: int | None,
    shift: bool, extras: Sequence[str], backend: str, memory_budget: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """logp, kl, ref_logp and extras, shaped like the labels. Gradients flow to `policy`'s tensors."""
    models, options = [], []
    for side in (policy, reference):
        models += [side.hidden, side.head.weight, side.head.bias]
        options += [side.head.logit_scale, side.head.softcap, side.dtype]
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in models[:3]]
    # as arguments: were they found inside, a graph cached on disk by another version would not fit
    size = room(policy, reference, min(memory_budget, 2**62)) if any(needs) else (0, 0)
    call = (labels, cu_seqlens, ignore_index, list(extras), *size)
    logp, kl, ref_logp, extra, _, _ = _forward(*models, *call, *options, shift, backend, needs)
    return logp, kl, ref_logp.detach(), *extra.detach().unbind()


# --- the operators ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("tdpo_kernels::token_stats", mutates_args=(), schema=FORWARD, tags=TAGS)
def _forward(*args: Any) -> tuple[Tensor, ...]:
    policy, reference, shift, backend, needs = _read(args)
    labels, cu_seqlens, ignore_index, extras, row_bytes, stage_bytes = args[_M:-_O]
    rows = pack(labels, cu_seqlens, policy.head.weight.shape[0], ignore_index=ignore_index, shift=shift)
    kept = Kept(row_bytes + stage_bytes, policy.hidden.device)
    _, implementation = choose(backend, policy.hidden.device, (policy, reference))
    call = lay_out(
        implementation, policy, reference, rows, stage_bytes, extras=tuple(extras), allocate=kept.allocate
    )  # fmt: skip
    out = call.forward(needs)
    if needs:
        kept.put(rows.label_T, rows.labels_T, *out.saved)
    logp, kl, ref_logp, *extra = call.statistics(out)
    extra = torch.stack(extra) if extra else logp.new_empty(0, *logp.shape)
    return logp, kl, ref_logp, extra, kept.buffer, kept.where()


@_forward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    policy, reference, _, backend, _ = _read(args)
    labels, _, _, extras, row_bytes, stage_bytes = args[_M:-_O]
    choose(backend, policy.hidden.device, (policy, reference))  # refused now rather than when it runs
    shapes = (labels.shape, labels.shape, labels.shape, (len(extras), *labels.shape))
    shown = [labels.new_empty(shape, dtype=stats_dtype(policy, reference)) for shape in shapes]
    kept = labels.new_empty(row_bytes + stage_bytes, dtype=torch.uint8)
    return *shown, kept, torch.empty(Kept.TABLE, dtype=torch.int64, device="cpu")


@torch.library.custom_op("tdpo_kernels::token_stats_backward", mutates_args=(), schema=BACKWARD, tags=TAGS)
def _backward(*args: Any) -> tuple[Tensor, ...]:
    policy, reference, shift, backend, needs = _read(args)
    kept, where, g_logp, g_kl = args[_M:-_O]
    label_T, labels_T, *saved = Kept.taken(kept, where)
    rows = Rows(label_T - 1 if shift and label_T is not None else label_T, label_T, labels_T)
    _, implementation = choose(backend, policy.hidden.device, (policy, reference))
    call = lay_out(implementation, policy, reference, rows, 0)
    with _above_autograd():
        grads = call.backward(needs, tuple(saved), g_logp, g_kl)
    return tuple(_none(args[0]) if g is None else g.contiguous() for g in (grads.hidden, grads.weight, grads.bias))


@_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) if need else _none(args[0]) for x, need in zip(args[:3], args[-1], strict=True))


def _setup(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *_, kept, where = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.options = inputs[-_O:]
    ctx.arguments = len(inputs)
    ctx.save_for_backward(*inputs[:_M], kept, where)


def _gradients(ctx, g_logp: Tensor | None, g_kl: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * ctx.arguments
    if g_logp is None and g_kl is None:
        return nothing
    grads = _backward(*ctx.saved_tensors, g_logp, g_kl, *ctx.options)
    needs = ctx.options[-1]
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *nothing[3:]


_forward.register_autograd(_gradients, setup_context=_setup)


def _read(args: tuple) -> tuple[Model, Model, bool, str, Needs]:
    models, (scale, cap, dtype, ref_scale, ref_cap, ref_dtype, shift, backend, needs) = args[:_M], args[-_O:]
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = (x if x is None else x.detach() for x in models)
    policy = Model(hidden, LMHead(weight, bias, scale, cap), dtype)
    reference = Model(ref_hidden, LMHead(ref_weight, ref_bias, ref_scale, ref_cap), ref_dtype)
    return policy, reference, shift, backend, Needs(*needs)


def _above_autograd() -> contextlib.AbstractContextManager:
    """Operators run below autograd, where the naive backend cannot differentiate."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)


def _none(like: Tensor) -> Tensor:
    """A gradient that nobody wants: an operator returns no None."""
    return like.new_empty(0)


# --- what is kept from forward to backward ---------------------------------------------------------------------------


def room(policy: Model, reference: Model, memory_budget: int) -> tuple[int, int]:
    """Bytes of row values and of stage, at most, were every row to count. DESIGN section 4: 2 + 2, 4 + 4 or 8 + 8
    bytes an entry, half as much again with a softcap; and what tiles of even size may stick out by. A call that is one
    tile keeps a plane more."""
    N, V = math.prod(policy.hidden.shape[:-1]), policy.head.weight.shape[0]
    stats = stats_dtype(policy, reference).itemsize
    planes = 2 if policy.head.softcap is None else 3
    per_entry = planes * (2 if policy.dtype in SIXTEEN_BIT else stats) + 2
    everything = (N + N // 16 + 16) * (V + V // 16 + 16) * per_entry
    per_row = 2 * torch.int64.itemsize + Kept.ROW_VALUES * stats
    rows = -(-N * per_row // Kept.ALIGNMENT) * Kept.ALIGNMENT + Kept.MOST * Kept.ALIGNMENT
    return rows, min(memory_budget, max(everything, one_tile.most_kept(policy, N)))


class Kept:
    """Tensors end to end in one flat buffer, and a table of where they lie."""

    ALIGNMENT = 256
    ROW_VALUES = 16  # at most, that a backend saves for each row besides what it stages
    CLEARED = 2**20  # a buffer of up to so many bytes is zero where unused: `torch.library.opcheck` compares it all
    MOST, AXES = 24, 4
    TABLE = (MOST, 2 + AXES)  # of each tensor dtype, offset in bytes, and shape; -1 where there is none
    DTYPES = (torch.uint8, torch.bool, torch.int32, torch.int64, *SIXTEEN_BIT, torch.float32, torch.float64)

    def __init__(self, size: int, device: torch.device) -> None:
        make = torch.zeros if size <= self.CLEARED else torch.empty
        self.buffer = make(size, dtype=torch.uint8, device=device)
        self.end, self.table = 0, []

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room for a tensor, so that `put` finds it in place."""
        begin, size = self.end, math.prod(shape) * dtype.itemsize
        if begin + size > self.buffer.numel():
            raise RuntimeError(
                f"{shape} {dtype} to keep for backward: {size} bytes after {begin} of {len(self.buffer)}"
            )
        self.end += -(-size // self.ALIGNMENT) * self.ALIGNMENT
        return self.buffer[begin : begin + size].view(dtype).view(shape)

    def put(self, *tensors: Tensor | None) -> None:
        self.table = [None if x is None else self._put(x) for x in tensors]

    def _put(self, x: Tensor) -> list[int]:
        if not x.is_contiguous() or x.untyped_storage()._cdata != self.buffer.untyped_storage()._cdata:
            x = self.allocate(tuple(x.shape), x.dtype).copy_(x)
        return [self.DTYPES.index(x.dtype), x.storage_offset() * x.element_size(), *x.shape]

    def where(self) -> Tensor:
        """The table, on the host: reading it waits for no device."""
        rows = [[-1] if row is None else row for row in self.table]
        rows = [row + [-1] * (self.TABLE[1] - len(row)) for row in rows]
        return torch.tensor(rows + [[-2] * self.TABLE[1]] * (self.MOST - len(rows)), dtype=torch.int64)

    @classmethod
    def taken(cls, buffer: Tensor, where: Tensor) -> list[Tensor | None]:
        rows = [row for row in where.tolist() if row[0] != -2]
        return [None if row[0] == -1 else cls._taken(buffer, *row) for row in rows]

    @classmethod
    def _taken(cls, buffer: Tensor, dtype: int, offset: int, *axes: int) -> Tensor:
        shape = [n for n in axes if n >= 0]
        size = math.prod(shape) * cls.DTYPES[dtype].itemsize
        return buffer[offset : offset + size].view(cls.DTYPES[dtype]).view(shape)
