"""Small problems to launch kernels on, and their truth.

Products are of numbers on a grid so coarse that fp32 sums them exactly, in any order: the logits are the truth's, and
what is off is row mathematics, an address or a mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from harness import EPS, F16, F32, F64, Row, on_grid, row
from torch import Tensor

from tdpo_kernels.backends.tile_math import LOWEST, largest_exponent

R, C, K = 16, 32, 16
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Problem:
    h: Tensor
    w: Tensor
    g: Tensor
    u: Tensor
    labels: Tensor
    bias: Tensor | None = None
    ref_bias: Tensor | None = None
    scale: float = 1.0
    ref_scale: float = 1.0
    softcap: float | None = None
    ref_softcap: float | None = None

    @property
    def T(self) -> int:
        return len(self.labels)

    @property
    def V(self) -> int:
        return len(self.w)

    @property
    def dtype(self) -> torch.dtype:
        return self.h.dtype

    @property
    def F(self) -> float:
        return largest_exponent(F32)

    @cached_property
    def logits(self) -> tuple[Tensor, Tensor]:
        """float64, and fp32 holds them unless there is a softcap."""
        return tuple(
            _head(x.double() @ y.double().T, b, s, c)
            for x, y, b, s, c in (
                (self.h, self.w, self.bias, self.scale, self.softcap),
                (self.g, self.u, self.ref_bias, self.ref_scale, self.ref_softcap),
            )
        )

    @cached_property
    def true(self) -> list[Row]:
        return self.truth(slice(0, self.V))

    def truth(self, columns: slice) -> list[Row]:
        z, r = self.logits
        return [row(z[i, columns], r[i, columns]) for i in range(self.T)]

    @cached_property
    def slope(self) -> Tensor:
        z = self.logits[0]
        return torch.ones_like(z) if self.softcap is None else 1 - (z / self.softcap) ** 2

    @property
    def loss(self) -> float:
        """What a softcap makes of exact products: eps of the logits' size."""
        return 8 * EPS * max([0.0, *(c for c in (self.softcap, self.ref_softcap) if c is not None)])

    def heads(self) -> dict[str, Any]:
        return dict(
            scale=self.scale,
            softcap=self.softcap or 1e-9,
            ref_scale=self.ref_scale,
            ref_softcap=self.ref_softcap or 1e-9,
        )

    def flags(self) -> dict[str, bool]:
        return dict(
            HAS_BIAS=self.bias is not None, HAS_SOFTCAP=self.softcap is not None,
            HAS_REF_BIAS=self.ref_bias is not None, HAS_REF_SOFTCAP=self.ref_softcap is not None,
        )  # fmt: skip


def _head(x: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    x = (x if bias is None else x + bias.double()) * scale
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    return torch.where(x == -math.inf, LOWEST, x)


def problem(
    T: int = 21,
    V: int = 86,
    D: int = 24,
    E: int = 20,
    apart: float | None = None,
    dtype: torch.dtype = F32,
    seed: int = 0,
) -> Problem:
    """D and E are no multiples of K, T none of R, V none of C: 3 tiles, the last of 22 columns. With `apart` the
    reference is the policy, but for a bias of that size."""
    gen = torch.Generator().manual_seed(seed)

    def grid(*shape: int, step: float = 1 / 8) -> Tensor:
        return on_grid(torch.randn(*shape, generator=gen, dtype=F64), step).clamp(-3, 3).to(dtype)

    h, w = grid(T, D), on_grid(grid(V, D).double() / 2, 1 / 8).to(dtype)
    labels = torch.randint(0, V, (T,), generator=gen)
    edges = [0, V - 1, C - 1, C, V - V % C]
    labels[:5] = torch.tensor(edges)[:T] % V
    if apart is not None:
        ref_bias = on_grid(apart * torch.randn(V, generator=gen, dtype=F64), 2.0**-16).float()
        return Problem(h, w, h.clone(), w, labels, ref_bias=ref_bias)
    return Problem(h, w, grid(T, E), on_grid(grid(V, E).double() / 2, 1 / 8).to(dtype), labels)


def one_head(p: Problem) -> Problem:
    """The same weight, other hidden states."""
    g = (p.h.double() + p.h.double().roll(3, 0) / 4).clamp(-3, 3)
    return replace(p, g=on_grid(g, 1 / 8).to(p.dtype), u=p.w)


def biased(p: Problem, out: tuple[int, ...] = ()) -> Problem:
    gen = torch.Generator().manual_seed(2)
    bias, ref_bias = (on_grid(torch.randn(p.V, generator=gen, dtype=F64), 1 / 8).to(p.dtype) for _ in range(2))
    bias[list(out)], ref_bias[list(out)] = -math.inf, -math.inf
    return replace(p, bias=bias, ref_bias=ref_bias)


PROBLEMS = {
    "plain": problem,
    "fp16": lambda: problem(dtype=F16),
    "near": lambda: problem(apart=2.0**-7),
    "near_offset": lambda: replace(p := problem(apart=2.0**-7), ref_bias=p.ref_bias + 32.0),
    "equal": lambda: problem(apart=0.0),
    "biased": lambda: replace(biased(problem()), scale=0.5, ref_scale=0.25),
    "ruled_out": lambda: _off_labels(biased(problem(), out=(*range(32, 64), 70, 85))),
    "softcap": lambda: replace(biased(problem()), softcap=8.0, ref_softcap=16.0, scale=0.5),
    "hated": lambda: _pushed(-104.0),
    "loved": lambda: _pushed(300.0),
    "one_row": lambda: problem(T=1, V=7, D=8, E=8),
    "multiples": lambda: problem(T=16, V=64, D=32, E=16),
}
STAGED = ("plain", "near", "ruled_out", "softcap", "hated", "loved")


def _off_labels(p: Problem) -> Problem:
    return replace(p, labels=torch.where(p.bias[p.labels].isinf(), 5, p.labels))


def _pushed(nats: float) -> Problem:
    p = problem()
    bias = torch.zeros(p.V)
    bias[[3, 85]] = nats
    return replace(p, bias=bias)


_made: dict[str, Problem] = {}


def made(name: str) -> Problem:
    """Each once: the truth costs more than the launches."""
    if name not in _made:
        p = PROBLEMS[name.removesuffix("+one_head")]()
        if name.endswith("+one_head"):
            p = one_head(p)
        _made[name] = p
    return _made[name]
