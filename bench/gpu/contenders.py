"""What is timed on a GPU: shapes, passes, and whose loss. Ratios are to one library product of 2 T V D flops."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor

from tdpo_kernels import fused_tdpo_loss

from ..problem import ALPHA, BETA, Problem
from ..providers.eager import tdpo2
from ..shapes import Shape
from .device import Step

Loss = Callable[[Problem], Tensor]
GEMM = "gemm"
EVERYTHING = 2**40
BUDGETS = {"0": 0, "all": EVERYTHING}
OURS = ("fused@0", "fused@all", "tiled@0", "tiled@all")
EVERYONE = (GEMM, *OURS, "eager", "compiled")

SHAPES = (
    Shape("8b", 8192, 128256, 4096, "a large model's head", EVERYONE, 10, ("bfloat16",)),
    Shape(
        "0.5b",
        8192,
        151936,
        896,
        "a small model's head, where row mathematics weighs most",
        EVERYONE,
        10,
        ("bfloat16",),
    ),  # fmt: skip # noqa: E501
    Shape(
        "8b-long",
        131072,
        128256,
        4096,
        "16 times the tokens in the same workspace",
        (GEMM, "fused@0", "tiled@0"),
        3,
        ("bfloat16",),
    ),  # fmt: skip # noqa: E501
    Shape("small", 512, 32000, 1024, "overhead per call", EVERYONE, 20, ("bfloat16",), calls=5),
    Shape("dry", 32, 300, 16, "does the campaign itself work", (GEMM, *OURS, "eager"), 2, ("float32",)),
    Shape("dry-long", 64, 300, 16, "the same, other sizes", (GEMM, "fused@0", "tiled@0"), 1, ("float32",)),
)


class Mode(Enum):
    FORWARD = "forward"
    TRAINABLE = "forward + backward"
    FROZEN = "forward + backward, frozen head"


def loss_of(name: str) -> Loss:
    """`compiled` is compiled anew, for one shape and mode."""
    if name == "eager":
        return lambda p: tdpo2(*_tensors(p))
    if name == "compiled":
        torch.compiler.reset()
        compiled = torch.compile(tdpo2, dynamic=False)
        return lambda p: compiled(*_tensors(p))
    backend, budget = name.split("@")
    options = dict(beta=BETA, alpha=ALPHA, shift=False, backend=backend, memory_budget=BUDGETS[budget])
    return lambda p: fused_tdpo_loss(*_tensors(p), **options).loss


def step_of(loss: Loss, problem: Problem, mode: Mode) -> Step:
    """Leaves gradients on the problem, and returns the loss."""

    def forward() -> Tensor:
        with torch.no_grad():
            return loss(problem)

    def both() -> Tensor:
        value = loss(problem)
        value.backward()
        return value.detach()

    return forward if mode is Mode.FORWARD else both


def _tensors(p: Problem) -> tuple[Tensor, ...]:
    return p.hidden, p.weight, p.ref_hidden, p.ref_weight, p.labels
