"""This library, at one memory budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tdpo_kernels import fused_tdpo_loss

from ..problem import ALPHA, BETA, Problem


@dataclass(frozen=True)
class Ours:
    label: str
    budget: int  # bytes kept from forward to backward
    backend: str = "tiled"

    @property
    def name(self) -> str:
        return f"ours@{self.label}"

    def available(self) -> str | None:
        return None

    def make(self, problem: Problem) -> Callable[[], Tensor]:
        options = dict(beta=BETA, alpha=ALPHA, shift=False, backend=self.backend, memory_budget=self.budget)

        def step() -> Tensor:
            p = problem
            loss = fused_tdpo_loss(p.hidden, p.weight, p.ref_hidden, p.ref_weight, p.labels, **options).loss
            loss.backward()
            return loss.detach()

        return step
