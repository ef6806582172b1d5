"""The truth about dz of the problems, for cotangents of every kind, and how far off an entry may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import oracle
import torch
from exact_problems import Problem, R, made
from harness import EPS, F64, Row, poisoned
from torch import Tensor

from tdpo_kernels.backends.tile_math import LOWEST

COTANGENTS = ("general", "kl_zero", "equal", "logp_zero", "blocks", "mixed", "zero")


@dataclass(frozen=True)
class Backward:
    """Coefficients ``(3, stride)``, the truth, and how far off an entry may be."""

    coefficients: Tensor
    true: Tensor
    bound: Tensor


def backward(p: Problem, what: str) -> Backward:
    """g_logp and g_kl of the kind, or by turns: in blocks of R rows, or row by row."""
    g_logp, g_kl = torch.randn(2, p.T, generator=torch.Generator().manual_seed(4)).double()
    n = torch.arange(p.T)
    kind = {"blocks": n // R, "mixed": n % 4}.get(
        what, torch.full_like(n, COTANGENTS.index(what) if what != "zero" else 4)
    )
    none = (kind == 4) | (torch.tensor(what == "blocks") & (kind == 0))
    g_kl = torch.where(kind == 1, 0.0, torch.where(kind == 2, g_logp, g_kl))
    g_logp = torch.where(kind == 3, 0.0, g_logp)
    g_logp, g_kl = torch.where(none, 0.0, g_logp), torch.where(none, 0.0, g_kl)
    stride = p.T + 3
    coefficients, true, bound = poisoned(3, stride), [], []
    for i, t in enumerate(p.true):
        a, b, y = -float(g_kl[i]) * p.scale, -float(g_logp[i]) * p.scale, int(p.labels[i])
        a, b = torch.tensor([a, b]).tolist()
        z, r = (oracle_row(x[i]) for x in p.logits)
        values = oracle.dz(z, r, y, -b, -a)
        coefficients[:, i] = torch.tensor([a, b, values[y]])
        true.append(values)
        bound.append([entry_bound(p, t, z, r, v, a, b) for v in range(p.V)])
    true, bound = torch.tensor(true, dtype=F64) * p.slope, torch.tensor(bound, dtype=F64)
    return Backward(coefficients, true, bound + true.abs() * EPS + p.loss * (true / p.slope).abs())


def oracle_row(x: Tensor) -> list[float]:
    return [-math.inf if v < LOWEST / 10 else v for v in x.tolist()]


def entry_bound(p: Problem, t: Row, z: list[float], r: list[float], v: int, a: float, b: float) -> float:
    """eps times the size of what p and q are exponentials of; where they agree only of their ratio."""
    if t.log_p[v] == -math.inf:
        return 0.0
    size = EPS * (4 + abs(z[v] - t.m_z) + abs(r[v] - t.m_r) + t.lse_z + t.lse_r) + p.loss
    x, y = math.exp(t.log_p[v]), math.exp(t.log_q[v])
    ratio = abs(t.log_q[v] - t.log_p[v])
    apart = ratio + abs(t.lse_diff) if ratio < 0.3 else 1.0
    lost = x * (t.rounding[v] + t.lost) if ratio < 1 else 0.0
    off = 8 * EPS * (t.kl + math.fsum(q * abs(q2 - p2) for q, q2, p2 in _apart(t)))
    return (
        2 * size * (abs(b) * x + abs(a) * apart * (x + y))
        + abs(a) * (lost + x * (off + p.loss))
        + 1e-37 * (abs(a) + abs(b))
    )


def _apart(t: Row) -> list[tuple[float, float, float]]:
    return [(math.exp(q), q, p) for p, q in zip(t.log_p, t.log_q, strict=True) if min(p, q) > -math.inf]


_backwards: dict[tuple[str, str], Backward] = {}


def made_backward(name: str, what: str) -> Backward:
    if (name, what) not in _backwards:
        _backwards[name, what] = backward(made(name), what)
    return _backwards[name, what]


def check_dz(found: Tensor, want: Backward, cols: tuple[int, int], more: float = 1.0, eps: float = 0.0) -> None:
    """Every entry, and nothing else written."""
    width = cols[1] - cols[0]
    assert found[:, width:].isnan().all()
    true, bound = want.true[:, slice(*cols)], want.bound[:, slice(*cols)]
    error = (found[:, :width].double() - true).abs()
    bad = ~(error <= more * bound + eps * true.abs())
    i, v = (bad * error.nan_to_num(math.inf)).flatten().argmax().item() // width, 0
    if bad.any():
        i, v = bad.nonzero()[0].tolist()
    assert not bad.any(), (
        f"{int(bad.sum())} of {bad.numel()}; ({i}, {v}): {found[i, v]}, wanted {true[i, v]} to {more * bound[i, v]:.3g}"
    )


def check_row_sums(found: Tensor, want: Backward, more: float = 1.0) -> None:
    assert (found.double().sum(1).abs() <= more * want.bound.sum(1) + EPS * want.true.abs().sum(1)).all()
