"""torch's own chunked `linear_cross_entropy`: log-probabilities of both models, so DPO. It has no KL: it does less."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import Problem
from ..shapes import Shape
from .provider import Provider, Step, dpo_from


def unavailable(shape: Shape, device: torch.device) -> str:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no chunked linear_cross_entropy, 2.13 has"
    return "it has no softcap" if shape.softcap else ""


def make(problem: Problem) -> Step:
    def logp_T(hidden: Tensor, weight: Tensor) -> Tensor:
        options, labels_T = torch.nn.LinearCrossEntropyOptions(), problem.packed(problem.labels)
        return -F.linear_cross_entropy(problem.packed(hidden), weight, labels_T, reduction="none", options=options)

    return Step(lambda: dpo_from(logp_T, problem))


PROVIDER = Provider("dpo", unavailable, make)
