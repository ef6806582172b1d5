"""Run torch operations on ``[T, V]`` logits, kept from forward to backward: a baseline for when in doubt."""

from __future__ import annotations

from torch import Tensor

from ..types import Gradients, Inputs, Needs, Part
from . import walk
from .grid import Grid
from .tiled import TorchTiles


def forward(inputs: Inputs, kept: Tensor) -> Part:
    return walk.forward(_one_tile(inputs), inputs, kept)


def backward(inputs: Inputs, needs: Needs, kept: Tensor, row: Tensor, total: Gradients | None) -> Gradients:
    return walk.backward(_one_tile(inputs), inputs, needs, kept, row, total)


def _one_tile(inputs: Inputs) -> TorchTiles:
    T, V = inputs.rows.count, inputs.policy.head.weight.shape[0]
    return TorchTiles(inputs, Grid(T, V, max(T, 1), V))
