"""The gate: the last code that knows a label can be ignored, that sequences have ends, that labels are shifted, or that
hidden states have more than two axes."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import Rows

# In units of one row of memory, how far apart neighbours along each leading axis lie. None: in order, as a matrix.
Steps = tuple[int, ...] | None


def pack(labels: Tensor, cu_seqlens: Tensor | None, vocab: int, *, ignore_index: int | None, shift: bool) -> Rows:
    """The rows that count, of ``labels`` ``(..., L)``, or ``(N,)`` between the offsets.

    Reads the device once: how many rows are left, the range of their labels and the offsets come back together; the
    rows are then found in a number known beforehand. ``ignore_index=None`` without offsets leaves nothing to ask: then
    a CUDA device is not read at all, and values are not checked.

    Raises:
        ValueError: a label that counts is outside the vocabulary, or offsets do not run from 0 to N without
            decreasing.
    """
    labels_N, count = labels.reshape(-1).long(), labels.numel()
    if count == 0:
        if cu_seqlens is not None:
            _check_offsets(cu_seqlens.tolist(), 0)
        return Rows(None, None, labels_N)
    valid_N = _valid(labels_N, labels.shape, cu_seqlens, ignore_index, shift)
    if ignore_index is None and cu_seqlens is None and labels.device.type != "cpu":
        left = count if valid_N is None else count - count // labels.shape[-1]
    else:
        left = _read(labels_N, valid_N, cu_seqlens, vocab)
    if left == count:
        return Rows(None, None, labels_N)
    label_T = valid_N.nonzero_static(size=left)[:, 0]
    return Rows(label_T - 1 if shift else label_T, label_T, labels_N.index_select(0, label_T))


def _valid(
    labels_N: Tensor, shape: torch.Size, cu_seqlens: Tensor | None, ignore_index: int | None, shift: bool
) -> Tensor | None:
    """Which labels count; None: all of them. When shifted, the first of a sequence has no predictor."""
    if ignore_index is None and not shift:
        return None
    valid_N = torch.ones_like(labels_N, dtype=torch.bool) if ignore_index is None else labels_N != ignore_index
    if shift and cu_seqlens is None:
        valid_N.view(shape)[..., 0].fill_(False)
    elif shift:  # sequences of no tokens at the very end begin at N: 0 is a beginning anyway
        valid_N.index_fill_(0, cu_seqlens[:-1].long().remainder(labels_N.numel()), False)
    return valid_N


def _read(labels_N: Tensor, valid_N: Tensor | None, cu_seqlens: Tensor | None, vocab: int) -> int:
    """How many rows count, once the values are found to be in order: the one read."""
    counted_N = labels_N if valid_N is None else labels_N * valid_N
    facts = torch.stack([*counted_N.aminmax(), *(() if valid_N is None else (valid_N.count_nonzero(),))])
    lowest, highest, *rest = (facts if cu_seqlens is None else torch.cat([facts, cu_seqlens.long()])).tolist()
    left = labels_N.numel() if valid_N is None else rest.pop(0)
    if cu_seqlens is not None:
        _check_offsets(rest, labels_N.numel())
    if lowest < 0 or highest >= vocab:
        _complain(labels_N, counted_N, vocab)
    return left


def _check_offsets(offsets: list[int], count: int) -> None:
    if offsets[0] != 0 or offsets[-1] != count:
        raise ValueError(
            f"cu_seqlens: runs from {offsets[0]} to {offsets[-1]}, wanted 0 to N = {count}, the rows of hidden"
        )
    for i, (a, b) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if a > b:
            raise ValueError(
                f"cu_seqlens: decreases from {a} to {b} at index {i + 1}, wanted offsets that never decrease"
            )


def _complain(labels_N: Tensor, counted_N: Tensor, vocab: int) -> None:
    where = ((counted_N < 0) | (counted_N >= vocab)).nonzero()[:, 0].tolist()
    raise ValueError(
        f"labels: {len(where)} label(s) outside [0, {vocab}), the first is {int(labels_N[where[0]])} at flat position "
        f"{where[0]}; wanted token ids below the heads' V, or ignore_index where a token does not count"
    )


def flatten(hidden: Tensor, ref_hidden: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Rows, Steps]:
    """Both hidden states as matrices, and the rows of them that predict.

    ``hidden[:, :-1]`` is no matrix without a copy, but a row index over its memory is. That index has to serve both
    models: where they lie differently in memory, the one that is no matrix is copied.
    """
    steps = _steps(hidden)
    if steps is None or steps != _steps(ref_hidden):
        return hidden.reshape(-1, hidden.shape[-1]), ref_hidden.reshape(-1, ref_hidden.shape[-1]), rows, None
    shape = hidden.shape[:-1]
    reach = _reach(shape, steps)
    row_N = torch.arange(reach, device=hidden.device).as_strided(shape, steps).reshape(-1)
    hidden_T = row_N if rows.hidden_T is None else row_N[rows.hidden_T]
    matrices = (_memory(x, steps, reach) for x in (hidden, ref_hidden))
    return *matrices, Rows(hidden_T, rows.label_T, rows.labels_T), steps


def unflatten(grad: Tensor, shape: torch.Size, steps: Steps) -> Tensor:
    """The gradient of a matrix that `flatten` returned, as that of the hidden states it came from. A view."""
    if steps is None:
        return grad.view(shape)
    row, column = grad.stride()
    return grad.as_strided(shape, (*(step * row for step in steps), column))


def _steps(x: Tensor) -> Steps:
    """None where `reshape` is as good or better: nothing to copy, rows that share memory, more gaps than rows."""
    if x.dim() == 2 or x.is_contiguous():
        return None
    axes = [(n, stride) for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    unit = min((stride for _, stride in axes), default=0)
    if unit == 0 or any(stride % unit for _, stride in axes):
        return None
    reach, in_order = 1, True
    for n, stride in sorted(axes, key=lambda axis: axis[1]):
        if stride // unit < reach:
            return None
        reach += stride // unit * (n - 1)
    for (_, outer), (n, inner) in zip(axes, axes[1:], strict=False):
        in_order &= outer == n * inner
    if in_order or reach > 2 * x.shape[:-1].numel():
        return None
    return tuple(stride // unit if n > 1 else 0 for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True))


def _reach(shape: torch.Size, steps: tuple[int, ...]) -> int:
    """How many rows of memory lie between the first and the last, both included."""
    return 1 + sum(step * (n - 1) for step, n in zip(steps, shape, strict=True))


def _memory(x: Tensor, steps: tuple[int, ...], reach: int) -> Tensor:
    unit = next(s // step for s, step in zip(x.stride(), steps, strict=False) if step)
    return x.as_strided((reach, x.shape[-1]), (unit, x.stride(-1)))


def spread(x_T: Tensor, rows: Rows, shape: torch.Size) -> Tensor:
    """The statistics of the rows that count, in the labels' shape, zero elsewhere. Memory of its own, and no view:
    its owner may change it in place."""
    if rows.label_T is None:
        return torch.view_copy(x_T, shape)
    out = x_T.new_zeros(shape)
    out.view(-1).index_copy_(0, rows.label_T, x_T)
    return out


def gather(x: Tensor, rows: Rows) -> Tensor:
    x = x.reshape(-1)
    return x if rows.label_T is None else x.index_select(0, rows.label_T)
