"""Run this library at one memory budget, on the backend that it chooses or on a named one."""

from __future__ import annotations

import torch
from torch import Tensor

from tdpo_kernels import LMHead, fused_tdpo_loss, token_stats
from tdpo_kernels.backends import availability

from ..problem import ALPHA, BETA, IGNORE, Problem, Step
from ..shapes import Shape
from .provider import Provider


def provider(backend: str, budget: int) -> Provider:
    """Return one of this library's providers; `backend` is what `fused_tdpo_loss` takes."""
    options = dict(ignore_index=IGNORE, shift=False, backend=backend, memory_budget=budget)

    def unavailable(shape: Shape, device: torch.device) -> str:
        told = availability(device).get(backend, "available")
        return "" if told.startswith("available") else told.removeprefix("unavailable: ")

    def make(problem: Problem) -> Step:
        inputs = _inputs(problem)
        return Step(lambda: fused_tdpo_loss(*inputs, beta=BETA, alpha=ALPHA, **options).loss)

    def kl(problem: Problem) -> Tensor:
        return token_stats(*_inputs(problem), **options).kl.sum(-1)

    return Provider("tdpo2", make, unavailable, kl, budget=budget)


def _inputs(p: Problem) -> tuple[Tensor, LMHead, Tensor, LMHead, Tensor]:
    head, ref_head = LMHead(p.weight, softcap=p.softcap), LMHead(p.ref_weight, softcap=p.softcap)
    return p.hidden, head, p.ref_hidden, ref_head, p.labels
