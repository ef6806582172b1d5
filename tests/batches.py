"""A small batch with random weights, its gradients, and the backends and budgets to ask for them with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

BACKENDS = ("naive", "tiled")
EVERYTHING = 2**40
backends = pytest.mark.parametrize("backend", BACKENDS)
budgets = pytest.mark.parametrize("budget", [0, 1200, EVERYTHING])


def batch(
    dtype: torch.dtype = torch.float64, rows: int = 4, length: int = 3, D: int = 3, V: int = 19, seed: int = 0
) -> dict:
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    return dict(
        hidden=randn(rows, length, D).requires_grad_(), head=randn(V, D).requires_grad_(),
        ref_hidden=randn(rows, length, D), ref_head=randn(V, D),
        labels=torch.randint(0, V, (rows, length), generator=gen), shift=False,
    )  # fmt: skip


def grads(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))
