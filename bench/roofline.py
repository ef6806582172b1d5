"""Count what a shape asks for, and measure what the machine gives in the same run: a big product and a big copy.

G is one product of 2 T V D flops at the measured rate, T the tokens that count. At these rates no step is faster than
`seconds`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from .shapes import Shape

GEMM = {"cpu": (2048, 4096, 1024), "cuda": (8192, 16384, 4096)}  # rows, columns, depth
COPY = {"cpu": 256 * 2**20, "cuda": 2**30}  # bytes
TRIES = 10


class Ceiling(NamedTuple):
    flops: float  # a second, of the largest product
    bytes: float  # a second, read and written


def flops(shape: Shape) -> float:
    """Count the floor's: both models' logits, dh, and dW unless the head is frozen."""
    return gemm_flops(shape) * (2 + shape.gradients + (shape.gradients and shape.trainable))


def gemm_flops(shape: Shape) -> float:
    return 2.0 * shape.rows * shape.V * shape.D


def bytes_moved(shape: Shape, dtype: str) -> int:
    """Count the least: hidden states and heads read forward, the policy's once more backward, gradients written."""
    hidden, head = shape.rows * shape.D, shape.V * shape.D
    forward = 2 * hidden + (1 if shape.one_head else 2) * head
    backward = hidden + head + hidden + (head if shape.trainable else 0)
    return (forward + shape.gradients * backward) * getattr(torch, dtype).itemsize


def seconds(shape: Shape, dtype: str, ceiling: Ceiling) -> float:
    """Return the roofline: whichever of the two takes longer."""
    return max(flops(shape) / ceiling.flops, bytes_moved(shape, dtype) / ceiling.bytes)


def measure(dtype: str, device: torch.device) -> Ceiling:
    """Return the best of a few tries each: a ceiling, not an average. Data is random, as zeros multiply faster."""
    rows, columns, depth = GEMM[device.type]
    kind = getattr(torch, dtype)
    a, b = (torch.randn(n, depth, device=device).to(kind) for n in (rows, columns))
    out = torch.empty(rows, columns, dtype=kind, device=device)
    gemm = _best(lambda: torch.mm(a, b.T, out=out), device)
    source = torch.ones(COPY[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _best(lambda: target.copy_(source), device)
    return Ceiling(2.0 * rows * columns * depth / gemm, 2 * source.numel() / copy)


def _best(step: Callable[[], object], device: torch.device) -> float:
    """Return the least seconds of a call. The first, which may load libraries, is not timed."""
    step()
    best = math.inf
    for _ in range(TRIES):
        _wait(device)
        began = time.perf_counter()
        step()
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
