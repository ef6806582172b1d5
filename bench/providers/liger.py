"""Compose TDPO from Liger's fused linear losses: JSD at beta = 0, which is the forward KL, and cross-entropy.

Both fold a batch into one number and make its gradient in the forward pass. So every sequence, whose share in TDPO's
loss is its own, needs calls of its own.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from ..problem import Problem
from ..shapes import Shape
from .provider import Provider, Step, preference

FORWARD_KL = 0.0


def unavailable(shape: Shape, device: torch.device) -> str:
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    if device.type != "cuda":
        return f"its Triton kernels run on CUDA, not on {device.type}"
    return "its fused linear JSD has no softcap" if shape.softcap else ""


def make(problem: Problem) -> Step:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def logp_S(hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.stack([
            -liger_fused_linear_cross_entropy(h, weight, y, reduction="sum", accum_dtype=torch.float32)
            for h, y in zip(_sequences(problem, hidden), _sequences(problem, problem.labels), strict=True)
        ])  # fmt: skip

    def forward() -> Tensor:
        with torch.no_grad():
            ref_logp_S = logp_S(problem.ref_hidden, problem.ref_weight)
        return preference(logp_S(problem.hidden, problem.weight) - ref_logp_S, kl(problem))

    return Step(forward)


def kl(problem: Problem) -> Tensor:
    """Multiply Liger's divergence by the number of tokens, which it has divided by."""
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return torch.stack([
        len(h) * liger_fused_linear_jsd(
            h, problem.weight, h_ref, problem.ref_weight, jsd_beta=FORWARD_KL, accum_dtype=torch.float32
        )
        for h, h_ref in zip(_sequences(problem, problem.hidden), _sequences(problem, problem.ref_hidden), strict=True)
    ])  # fmt: skip


def _sequences(problem: Problem, x: Tensor) -> tuple[Tensor, ...]:
    return problem.packed(x).split(len(problem.packed(problem.labels)) // len(problem.labels))


PROVIDER = Provider("tdpo2", unavailable, make, kl)
