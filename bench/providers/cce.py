"""Apple's cut-cross-entropy: log-probabilities of both models, so DPO. It has no KL: it does less."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from ..problem import Problem
from ..shapes import Shape
from .provider import Provider, Step, dpo_from


def unavailable(shape: Shape, device: torch.device) -> str:
    if find_spec("cut_cross_entropy") is None:
        return "cut-cross-entropy is not installed"
    return "" if device.type == "cuda" else f"its Triton kernels run on CUDA, not on {device.type}"


def make(problem: Problem) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    def logp_T(hidden: Tensor, weight: Tensor) -> Tensor:
        labels_T = problem.packed(problem.labels)
        return -linear_cross_entropy(
            problem.packed(hidden), weight, labels_T, softcap=problem.softcap, reduction="none", impl="cce"
        )

    return Step(lambda: dpo_from(logp_T, problem))


PROVIDER = Provider("dpo", unavailable, make)
