"""Pack the rows that count. No code below knows that labels can be ignored or shifted, or that sequences end."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import Rows


def pack(labels: Tensor, cu_seqlens: Tensor | None, vocab: int, *, ignore_index: int | None, shift: bool) -> Rows:
    """Return the rows that count, for ``labels`` ``(..., L)``, or ``(N,)`` packed between the offsets.

    The device is read once: the number of rows, the range of their labels and the offsets come back together. With
    ``ignore_index=None`` and without offsets a CUDA device is not read at all, and values are not checked.

    Raises:
        ValueError: if a label that counts is outside the vocabulary, or offsets decrease, or do not run from 0 to N.
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
    return rows_of(label_T, labels_N.index_select(0, label_T), count, shift)


def rows_of(label_T: Tensor, labels_T: Tensor, count: int, shift: bool) -> Rows:
    """Return the rows whose labels stand at `label_T` of `count` positions."""
    if labels_T.numel() == count:
        return Rows(None, None, labels_T)
    return Rows(label_T - 1 if shift else label_T, label_T, labels_T)


def subset(rows: Rows, *blocks: slice) -> Rows:
    """Return the rows in these blocks, one block after the other."""
    if sum(block.stop - block.start for block in blocks) == rows.count:
        return rows
    every_T = torch.arange(rows.count, device=rows.labels_T.device) if rows.hidden_T is None else None
    return Rows(*(
        torch.cat([(every_T if x is None else x)[block] for block in blocks])
        for x in (rows.hidden_T, rows.label_T, rows.labels_T)
    ))  # fmt: skip


def counts(rows: Rows, shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """Return how many rows of each sequence count ``(S,)``, for labels of this shape."""
    sequence_T = sequences(rows, shape, cu_seqlens)
    return torch.bincount(sequence_T, minlength=shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1)


def sequences(rows: Rows, shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """Return the sequence that each row belongs to, ``(T,)``."""
    at_T = torch.arange(shape.numel(), device=rows.labels_T.device) if rows.label_T is None else rows.label_T
    if cu_seqlens is None:
        return at_T // max(shape[-1], 1)
    return torch.bucketize(at_T, cu_seqlens[1:].long(), right=True)


def counted(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int | None, shift: bool) -> Tensor:
    """Return which labels count, in their shape."""
    valid_N = _valid(labels.reshape(-1), labels.shape, cu_seqlens, ignore_index, shift)
    return torch.ones_like(labels, dtype=torch.bool) if valid_N is None else valid_N.view(labels.shape)


def _valid(
    labels_N: Tensor, shape: torch.Size, cu_seqlens: Tensor | None, ignore_index: int | None, shift: bool
) -> Tensor | None:
    """Return which labels count, or None if all do. When shifted, a sequence's first label has no predictor."""
    if ignore_index is None and not shift:
        return None
    valid_N = torch.ones_like(labels_N, dtype=torch.bool) if ignore_index is None else labels_N != ignore_index
    if shift and cu_seqlens is None:
        valid_N.view(shape)[..., 0].fill_(False)
    elif shift:  # empty sequences at the very end begin at N, which becomes 0, a beginning anyway
        valid_N.index_fill_(0, cu_seqlens[:-1].long().remainder(labels_N.numel()), False)
    return valid_N


def _read(labels_N: Tensor, valid_N: Tensor | None, cu_seqlens: Tensor | None, vocab: int) -> int:
    """Return how many rows count, or raise ValueError for bad values; this is the one read of the device."""
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


def spread(x_T: Tensor, rows: Rows, shape: torch.Size) -> Tensor:
    """Return `x_T`, one value for each row that counts, in the labels' shape, zero elsewhere, never as a view."""
    if rows.label_T is None:
        return torch.view_copy(x_T, shape)
    out = x_T.new_zeros(shape)
    out.view(-1).index_copy_(0, rows.label_T, x_T)
    return out


def gather(x: Tensor, rows: Rows) -> Tensor:
    """Return the entries at rows that count, ``(T,)``, of an x in the labels' shape."""
    x = x.reshape(-1)
    return x if rows.label_T is None else x.index_select(0, rows.label_T)
