r"""Row mathematics of one ``(R, C)`` tile of logits, in torch, in place. No products, no loops, no knowledge of labels' meaning.

A *part* is a slice of the vocabulary. Of each row of a part we keep four numbers: its log-sum-exps ``lse_z`` and ``lse_r``, the mean
``mu = E_q[z - r]`` under the part's own softmax of r, and ``M = E_q[expm1(y) - y] >= 0`` with ``y = z - r - mu``: eq. (2b) of
`reference.py` with the sign of delta turned, so that its exponential needs no negation. Then, per part as for the whole,

    (8)   KL = log1p(M)        L - L' = KL + mu        E_q[e^y] = 1 + M = exp(lse_z - lse_r - mu)

Parts k merge exactly, in any order, with weights ``w_k = exp(lse_r_k - L')``, ``mu = sum w_k mu_k`` and ``Y_k = mu_k - mu``:

    (9)   M = sum_k [ w_k (e^Y_k M_k + expm1(Y_k) - Y_k) ]

A single column is itself a part with M = 0, so (9) is also how a tile is summed. e^y overflows where the reference all but rules out
what the policy likes. There ``q e^y`` is still known from the policy's side, ``q_v e^y_v = p_v exp(lse_z - lse_r - mu)`` by (8), and with the exponent cut at
CUT the missing part is ``relu(p_v exp(lse_z - lse_r - mu) - q_v e^CUT)``: zero, but for rounding, wherever nothing was cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CUT = 16.0
LOWEST = -1e30  # stands for -inf in a tile, so that inf - inf never happens
LARGEST_KL = 60.0  # above it 1 + M leaves fp32, and KL = L - L' - mu no longer cancels


@dataclass(frozen=True)
class RowState:
    """The whole vocabulary's parts merged, each ``(R,)``."""

    lse_z: Tensor
    lse_r: Tensor
    kl: Tensor
    lse_diff: Tensor  # L - L', without cancellation


def floor_exponent(dtype: torch.dtype) -> float:
    """F: probabilities below e^-F within a part are held at e^-F, so that e^-F * e^-F is still a normal number of `dtype`."""
    return -0.46 * math.log(torch.finfo(dtype).tiny)


def softmax_(x: Tensor, out: Tensor) -> Tensor:
    """Softmax of each row of the part into `out`; returns its log-sum-exp. The largest probability is 1 / sum exp(x - max)."""
    torch.softmax(x, -1, out=out)
    return x.amax(-1) - out.amax(-1).log()


def divergence_(z: Tensor, r: Tensor, p: Tensor, q: Tensor, y: Tensor, lse_z: Tensor, lse_r: Tensor) -> tuple[Tensor, Tensor]:
    """mu and M of the part; writes the centred y, and uses z as scratch."""
    torch.sub(z, r, out=y)
    mean = torch.linalg.vecdot(q, y)
    y.sub_(mean[:, None])
    terms = torch.clamp(y, max=CUT, out=z).expm1_().sub_(y)
    phi = torch.linalg.vecdot(q, terms)
    torch.mul(p, (lse_z - lse_r - mean).exp_()[:, None], out=terms)
    missing = terms.sub_(q, alpha=math.exp(CUT)).clamp_(min=0.0).sum(-1)
    return mean, (phi + missing).clamp_(min=0.0)


def merge(parts_4KR: Tensor) -> RowState:
    """Eq. (9) over K parts, then (8)."""
    lse_z, lse_r, mean, phi = parts_4KR
    if parts_4KR.shape[1] == 1:
        lse_z, lse_r, mean, phi = lse_z[0], lse_r[0], mean[0], phi[0]
    else:
        lse_z_K, lse_r_K, mean_K, phi_K = lse_z, lse_r, mean, phi
        lse_z, lse_r = lse_z_K.logsumexp(0), lse_r_K.logsumexp(0)
        w_K = (lse_r_K - lse_r).exp_()
        mean = (w_K * mean_K).sum(0)
        y_K = mean_K - mean
        cut_K = y_K.clamp(max=CUT)
        whole = w_K * (cut_K.exp() * phi_K + cut_K.expm1() - y_K)
        missing = (lse_z_K - lse_r - mean).exp_() - w_K * math.exp(CUT) * (1 + phi_K)
        phi = (whole + missing.clamp_(min=0.0)).sum(0).clamp_(min=0.0)
    kl = phi.log1p()
    direct = lse_z - lse_r - mean
    near = kl < LARGEST_KL  # False for NaN
    kl = torch.where(near, kl, direct)
    return RowState(lse_z, lse_r, kl, torch.where(near, kl + mean, lse_z - lse_r))


def to_infinity(x: Tensor) -> Tensor:
    """Results that lean on LOWEST become the infinities they stand for."""
    return torch.where(x.abs() > -LOWEST / 10, torch.copysign(torch.full_like(x, math.inf), x), x)


def hold_(p: Tensor, y: Tensor, r: Tensor, lse_z: Tensor, mean: Tensor) -> None:
    """Holds p at e^-F and moves y so that p e^-y still gives q there: q may be large where p is nothing. Uses r as scratch."""
    floor = floor_exponent(p.dtype)
    torch.sub((lse_z - mean - floor)[:, None], r, out=r)
    torch.maximum(y, r, out=y)
    p.clamp_(min=math.exp(-floor))


class Extras:
    """Statistics of the policy's own distribution, over parts of the vocabulary: `reference.extra_statistics`."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self.total, self.largest = like.new_zeros(rows), like.new_full((rows,), -math.inf)
        self.lse_k: list[Tensor] = []
        self.mean_k: list[Tensor] = []  # E_p[z] within the part

    def add(self, z: Tensor, p: Tensor, lse_z: Tensor) -> None:
        self.total = self.total + z.sum(-1)
        self.largest = torch.maximum(self.largest, z.amax(-1))
        self.lse_k.append(lse_z)
        self.mean_k.append(torch.linalg.vecdot(p, z))

    def results(self, lse_z: Tensor, z_y: Tensor, vocab: int) -> dict[str, Tensor]:
        entropy = sum((lse_k - lse_z).exp() * (lse_z - mean_k) for lse_k, mean_k in zip(self.lse_k, self.mean_k, strict=True))
        return {"entropy": entropy, "mean_logit": self.total / vocab, "is_argmax": (z_y >= self.largest).to(z_y.dtype)}
