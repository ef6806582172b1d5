"""Batches with ignored prompts and padding, the same packed, and outputs compared field by field."""

from __future__ import annotations

from dataclasses import fields

import torch
from batches import batch, close

from tdpo_kernels import TDPOOutput, TokenStats

P, L, D, E, V = 2, 9, 8, 6, 37


def ragged_batch(dtype: torch.dtype = torch.float64, rows: int = 2 * P, seed: int = 0) -> dict:
    """Return a shifted call with ragged prompts and padding that are ignored."""
    call = batch(dtype, rows, L, D, V, seed, E)
    del call["shift"]
    for s, row in enumerate(call["labels"]):
        row[: s % 3 + 1] = -100
        row[L - s % 2 :] = -100
    return call


def pack(call: dict, lengths: list[int]) -> dict:
    """Return the first `lengths[s]` positions of each row, end to end."""
    out = dict(call)
    for name in ("hidden", "ref_hidden", "labels"):
        out[name] = torch.cat([row[:n] for row, n in zip(call[name], lengths, strict=True)])
    return out | {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}


def ragged() -> tuple[dict, list[int]]:
    """Return right-padded sequences: one of no tokens at all, one with an empty completion, one of a single token."""
    lengths = [L, 0, 4, 1, L - 2, 6]
    call = ragged_batch(rows=6)
    labels = call["labels"].clone()
    for s, n in enumerate(lengths):
        labels[s, n:] = -100
    labels[2] = -100
    return call | {"labels": labels}, lengths


def fields_equal(a: TDPOOutput | TokenStats, b: TDPOOutput | TokenStats) -> None:
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        fields_equal(x, y) if isinstance(x, TokenStats) else close(x, y)
