"""Compute DPO from fused losses that have no KL, which is less than TDPO: Apple's cut-cross-entropy, and torch's own
chunked `linear_cross_entropy`. Both give log-probabilities of both models."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import Problem
from ..shapes import Shape
from .provider import Provider, Step, dpo_from


def _no_cce(shape: Shape, device: torch.device) -> str:
    if find_spec("cut_cross_entropy") is None:
        return "cut-cross-entropy is not installed"
    return "" if device.type == "cuda" else f"its Triton kernels run on CUDA, not on {device.type}"


def _cce(problem: Problem) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    def logp_T(hidden: Tensor, weight: Tensor) -> Tensor:
        rows, labels_T = problem.packed(hidden), problem.packed(problem.labels)
        return -linear_cross_entropy(
            rows, weight, labels_T, softcap=problem.softcap, reduction="none", impl="cce"
        )  # fmt: skip

    return Step(lambda: dpo_from(logp_T, problem))


def _no_linear_ce(shape: Shape, device: torch.device) -> str:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no chunked linear_cross_entropy, 2.13 has"
    return "it has no softcap" if shape.softcap else ""


def _linear_ce(problem: Problem) -> Step:
    def logp_T(hidden: Tensor, weight: Tensor) -> Tensor:
        options, labels_T = torch.nn.LinearCrossEntropyOptions(), problem.packed(problem.labels)
        return -F.linear_cross_entropy(problem.packed(hidden), weight, labels_T, reduction="none", options=options)

    return Step(lambda: dpo_from(logp_T, problem))


CCE = Provider("dpo", _no_cce, _cce)
LINEAR_CE = Provider("dpo", _no_linear_ce, _linear_ce)
