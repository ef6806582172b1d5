"""The gate: the last code that knows a label can be ignored, that sequences have ends, or that labels are shifted."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import Rows


def pack(labels_N: Tensor, starts_S: Tensor, vocab: int, *, ignore_index: int | None, shift: bool) -> Rows:
    """The rows that count. ``starts_S``: where each sequence begins in ``labels_N``; the label there has no
    predictor when shifted.

    Makes one synchronisation on CUDA (how many rows are left), and reads the verdict on the labels' range within it.
    ``ignore_index=None`` with ``shift=False`` says that every row counts: then nothing is read back from a CUDA device.
    """
    labels_N = labels_N.long()
    everything = Rows(None, None, labels_N)
    if labels_N.numel() == 0 or (ignore_index is None and not shift and labels_N.device.type != "cpu"):
        return everything
    lowest, highest = torch.stack(labels_N.aminmax()).tolist()
    in_range = lowest >= 0 and highest < vocab
    if not shift and in_range and (ignore_index is None or not lowest <= ignore_index <= highest):
        return everything
    valid_N = torch.ones_like(labels_N, dtype=torch.bool) if ignore_index is None else labels_N != ignore_index
    if shift:
        # an empty sequence at the very end begins at N: send it to a slot past the end
        padded = torch.cat([valid_N, valid_N.new_zeros(1)])
        valid_N = padded.index_fill(0, starts_S, False)[:-1]
    if not in_range:
        _check_range(labels_N, valid_N, vocab)
    label_T = valid_N.nonzero()[:, 0]
    return Rows(label_T - 1 if shift else label_T, label_T, labels_N[label_T])


def _check_range(labels_N: Tensor, valid_N: Tensor, vocab: int) -> None:
    """A ValueError if a label that counts is outside the vocabulary."""
    outside_N = valid_N & ((labels_N < 0) | (labels_N >= vocab))
    if outside := int(outside_N.sum()):
        where = int(outside_N.nonzero()[0, 0])
        raise ValueError(
            f"labels: {outside} label(s) outside [0, {vocab}), the first is {int(labels_N[where])} at flat position "
            f"{where}; wanted token ids below the heads' V, or ignore_index where a token does not count"
        )
