"""Run Triton kernels that make both models' logits in registers, for fp32, bf16 and fp16."""

from __future__ import annotations

from torch import Tensor

from ..types import Gradients, Inputs, Needs, Part
from . import walk
from .kerneltiles import FusedTiles


def forward(inputs: Inputs, kept: Tensor) -> Part:
    return walk.forward(FusedTiles(inputs), inputs, kept)


def backward(inputs: Inputs, needs: Needs, kept: Tensor, row: Tensor, total: Gradients | None) -> Gradients:
    return walk.backward(FusedTiles(inputs), inputs, needs, kept, row, total)
