"""Steps that the self-check looks at: small, in a process that has checked nothing yet."""

from __future__ import annotations

import closeness
import numpy as np
import pytest
import torch
from cases import Problem, base, cotangents
from harness import F32

from tdpo_kernels.backends import launch, selfcheck, slab
from tdpo_kernels.tuning import TileConfig

EVERYTHING = 2**40


def small_tile(*_, **__) -> TileConfig:
    return TileConfig(16, 64, 32)


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch):
    """Nothing checked yet, the switch at its default, and tiles so small that there are edges."""
    monkeypatch.delenv(selfcheck.SWITCH, raising=False)
    monkeypatch.setattr(launch, "choose", small_tile)
    monkeypatch.setitem(slab.TILE, "cpu", (32, 128))
    selfcheck.forget()
    with np.errstate(over="ignore", invalid="ignore"):
        yield
    selfcheck.forget()


def problem(dtype: torch.dtype = F32, seed: int = 1) -> Problem:
    return base(seed, L=50).problem(dtype)


def step(p: Problem, budget: int = EVERYTHING, kind: str = "general") -> None:
    """Forward and backward."""
    closeness.ours(p, cotangents(kind, p.labels), "fused", budget)


def wrong_label(*args):
    return (*args[:3], args[3] + 1, *args[4:])
