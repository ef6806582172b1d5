"""Rows to launch on, and the truth about them, of `truth.py`.

A problem's products are its logits: hidden states are the identity and the weight is the logits' transpose, so fp32
sums them exactly in any order, and what is off is row mathematics, an address or a mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from harness import F32, F64
from torch import Tensor
from truth import Array, difference_of, dz_of, exact, log_softmax

from tdpo_kernels import LMHead

LOWEST = -1e30


@dataclass(frozen=True, eq=False)
class Problem:
    """Products ``(T, V)`` of both models, what their heads make of them, and a label for each row."""

    products: tuple[Tensor, Tensor]
    labels: Tensor
    dtype: torch.dtype = F32
    biases: tuple[Tensor | None, Tensor | None] = (None, None)
    scales: tuple[float, float] = (1.0, 1.0)
    softcaps: tuple[float | None, float | None] = (None, None)
    weights: dict[int, Tensor] = field(default_factory=dict)

    @property
    def T(self) -> int:
        return len(self.labels)

    @property
    def V(self) -> int:
        return self.products[0].shape[1]

    def head(self, i: int) -> LMHead:
        weight = self.weights.setdefault(i, self.products[i].T.contiguous().to(self.dtype))
        return LMHead(weight, self.biases[i], self.scales[i], self.softcaps[i])

    @cached_property
    def logits(self) -> tuple[Array, Array]:
        return tuple(self._logits(i) for i in range(2))

    def _logits(self, i: int) -> Array:
        """Sums and scales as fp32 rounds them, a softcap as nothing does."""
        x, bias, cap = self.products[i].to(self.dtype).float(), self.biases[i], self.softcaps[i]
        x = (x if bias is None else x + bias.float()) * self.scales[i]
        x = exact(x) if cap is None else cap * np.tanh(exact(x) / cap)
        return x if bias is None else np.where(exact(bias) < LOWEST / 10, -np.inf, x)

    @cached_property
    def true(self) -> Truth:
        return truth(*self.logits)


@dataclass(frozen=True, eq=False)
class Truth:
    log_p: Array
    log_q: Array

    @cached_property
    def p(self) -> Array:
        return np.exp(self.log_p)

    @cached_property
    def q(self) -> Array:
        return np.exp(self.log_q)

    @cached_property
    def difference(self) -> tuple[Array, Array]:
        """``q - p``, and the terms of the KL."""
        return difference_of(self.log_p, self.log_q, self.p, self.q)

    @property
    def kl(self) -> Array:
        return self.difference[1].sum(1)

    def dz(self, labels: Tensor, g_logp: Array, g_kl: Array) -> Array:
        return dz_of(g_logp, g_kl, self.p, self.q, self.difference[0], labels.numpy())[0]


def truth(z: Array, r: Array) -> Truth:
    return Truth(log_softmax(z), log_softmax(r))


# --- eq. (8) over parts, in float64 -----------------------------------------------------------------------------------


def merge(parts: Array) -> Array:
    """States ``(K, 6, T)`` to ``(6, T)``, float64."""
    top_z, top_r = parts[:, 0].max(0), parts[:, 1].max(0)
    down_z, down_r = parts[:, 0] - top_z + parts[:, 2], parts[:, 1] - top_r + parts[:, 3]
    lse_z, lse_r = np.log(np.exp(down_z).sum(0)), np.log(np.exp(down_r).sum(0))
    P, Q = np.exp(down_z - lse_z), np.exp(down_r - lse_r)
    Y = (parts[:, 0] - top_z) - (parts[:, 1] - top_r) + parts[:, 5] - (lse_z - lse_r)
    more = np.where(Y < 8, Q * np.expm1(np.minimum(Y, 8)), P - Q)
    psi = np.where(np.abs(Y) < 0.01, Q * Y * Y * (1 / 2 + Y / 6 + Y * Y / 24 + Y**3 / 120), more - Q * Y)
    e = more.sum(0)
    kl = (Q * parts[:, 4] + psi).sum(0) - e * e / 2
    return np.stack([top_z, top_r, lse_z, lse_r, np.maximum(kl, 0), lse_z - lse_r + e])


def with_label(states: Tensor, label_logits: Tensor) -> Array:
    """The whole row's state: all parts', then the label's, a part of its own."""
    label = np.zeros((1, 6, states.shape[2]))
    label[0, :2] = label_logits.double().numpy()
    return merge(np.concatenate([merge(states[:, :6].double().numpy())[None], label]))


# --- problems ---------------------------------------------------------------------------------------------------------


def problem(kind: str, T: int = 21, V: int = 86, seed: int = 0, dtype: torch.dtype = F32) -> Problem:
    """T is no multiple of a row block, V none of a tile, whose last one has the label of one row."""
    g = torch.Generator().manual_seed(seed)
    z, noise = torch.randn(2, T, V, generator=g, dtype=F64)
    labels = torch.randint(0, V, (T,), generator=g)
    labels[: min(T, 3)] = torch.tensor([V - 1, 0, V // 2])[:T]
    name, *numbers = kind.split("_")
    x = [float(n) for n in numbers]
    if name == "peaked":
        z, r = 12 * z, 12 * z + 4 * noise
    elif name == "flat":
        z, r = 0.02 * z, 0.02 * z + 0.01 * noise
    elif name == "near":  # apart, offset
        r = z + x[0] * noise - x[1]
    elif name == "sure":  # by so many nats, in both models
        sure = torch.zeros(T, V, dtype=F64).scatter_(1, labels[:, None], x[0] + z.logsumexp(1, keepdim=True))
        z, r = z + sure, z + 0.3 * noise + sure
    elif name in ("loved", "hated"):  # one column, by the policy or by the reference
        r = z + 0.5 * noise
        (z if name == "loved" else r)[:, V // 2] += x[0] if name == "loved" else -x[0]
    else:
        r = z + 0.5 * noise
    return Problem((z.float(), r.float()), labels, dtype)


def biased(p: Problem, out: tuple[int, ...] = (), only: int | None = None, **more) -> Problem:
    """Return the problem with biases, which rule columns out, of one model or of both."""
    biases = [torch.randn(p.V, generator=torch.Generator().manual_seed(i)).to(p.dtype) for i in (5, 6)]
    for i in range(2):
        if only in (None, i):
            biases[i][list(out)] = -torch.inf
    labels = torch.where(torch.isin(p.labels, torch.tensor(out, dtype=torch.int64)), 1, p.labels)
    return replace(p, biases=tuple(biases), labels=labels, weights={}, **more)


OUT = (*range(32, 64), 70, 85)
KINDS = (
    "peaked", "flat", "general", "near_1e-3_0", "near_1e-4_7", "near_1e-5_0", "near_1e-3_1000", "sure_15", "sure_20",
    "sure_30", "loved_-104", "loved_45", "loved_300", "hated_12", "hated_104", "hated_300",
)  # fmt: skip
PROBLEMS = {kind: lambda kind=kind: problem(kind) for kind in KINDS} | {
    "fp16": lambda: problem("general", dtype=torch.float16),
    "biased": lambda: biased(problem("general"), scales=(0.5, 0.25)),
    "ruled_out": lambda: biased(problem("general"), OUT),
    "reference_out": lambda: biased(problem("general"), OUT, only=1),
    "softcap": lambda: biased(problem("peaked"), (3, 40), softcaps=(8.0, 16.0)),
    "one_row": lambda: problem("general", T=1, V=7),
    "multiples": lambda: problem("general", T=16, V=64),
}  # fmt: skip
_made: dict[str, Problem] = {}


def made(name: str) -> Problem:
    """Each once: the truth costs more than the launches."""
    if name not in _made:
        _made[name] = PROBLEMS[name]()
    return _made[name]
