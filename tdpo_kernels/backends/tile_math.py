r"""Row mathematics of one ``(R, C)`` tile of logits, in torch, in place. No products, no loops, no labels.

Logits come *anchored*: less one number per row and model (`anchor`), the same for every tile of the row, so that an
offset between the models, which changes nothing, costs no digits either.

A *part* is a slice of the vocabulary. Of each row of a part four numbers are kept: its log-sum-exps ``lse_z`` and
``lse_r``, the mean ``mu = E_q[z - r]`` under the part's own softmax of r, and ``M = E_q[expm1(y) - y] >= 0`` with
``y = z - r - mu``: eq. (2b) of `reference.py` with the sign of delta turned, so that its exponential needs no
negation. Then, for a part as for the whole,

    (8)   KL = log1p(M)        L - L' = KL + mu        E_q[e^y] = 1 + M = exp(lse_z - lse_r - mu)

Parts k merge exactly, in any order, with ``w = softmax_k(lse_r_k)``, ``mu = sum w_k mu_k`` and ``Y_k = mu_k - mu``:

    (9)   M = sum_k [ w_k (e^Y_k M_k + expm1(Y_k) - Y_k) ]  =  sum_k [ exp(lse_z_k - L' - mu) - w_k (1 + Y_k) ]

where the second form is for large terms: it asks nothing of a part's own M, which overflows where the reference all
but rules out what the policy likes. A single column is a part with M = 0, so (9) also says how a tile is summed:
there the exponent is cut at CUT, and what that leaves out is ``relu(p_v exp(lse_z - lse_r - mu) - q_v e^CUT)``,
zero, but for rounding, wherever nothing was cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CUT = 16.0
LARGE = 1e12  # terms of (9) above it are summed in their second form
TOP_EXPONENT = 80.0  # keeps exp() finite in fp32; a part that needs more is LARGE anyway
LARGEST_KL = 60.0  # above it 1 + M leaves fp32, and KL = L - L' - mu no longer cancels
LOWEST = -1e30  # stands for -inf in a tile, so that inf - inf never happens


@dataclass(frozen=True)
class RowState:
    """The whole vocabulary's parts merged, each ``(R,)``, still anchored."""

    lse_z: Tensor
    lse_r: Tensor
    kl: Tensor
    lse_diff: Tensor  # L - L', without cancellation


def is_lowest(x: Tensor) -> Tensor:
    return x < LOWEST / 10


def anchor(x_RC: Tensor) -> Tensor:
    """The number to take off a row of logits: its first tile's largest, or 0 where that tile is ruled out
    altogether."""
    top_R = x_RC.amax(-1)
    return torch.where(is_lowest(top_R), 0.0, top_R)


def largest_exponent(dtype: torch.dtype) -> float:
    """F: log-ratios are held above -F. e^-F is far below rounding, and e^(2F) leaves room for cotangents in `dtype`."""
    return -0.345 * math.log(torch.finfo(dtype).tiny)


def softmax_(x: Tensor, out: Tensor) -> Tensor:
    """Softmax of each row of the part into `out`; returns its log-sum-exp. The largest probability is 1 / sum exp(x
    - max)."""
    torch.softmax(x, -1, out=out)
    return x.amax(-1) - out.amax(-1).log()


def divergence_(
    z: Tensor, r: Tensor, p: Tensor, q: Tensor, y: Tensor, lse_z: Tensor, lse_r: Tensor
) -> tuple[Tensor, Tensor]:
    """mu and M of the part; writes the centred y, and uses z as scratch. Centring twice leaves no trace of q's sum
    not being 1."""
    torch.sub(z, r, out=y)
    mean = torch.linalg.vecdot(q, y)
    y.sub_(mean[:, None])
    rest = torch.linalg.vecdot(q, y)
    y.sub_(rest[:, None])
    mean = mean + rest
    terms = torch.clamp(y, max=CUT, out=z).expm1_().sub_(y)
    phi = torch.linalg.vecdot(q, terms)
    mass = (lse_z - lse_r - mean).clamp_(max=TOP_EXPONENT).exp_()
    torch.mul(p, mass[:, None], out=terms)
    missing = terms.sub_(q, alpha=math.exp(CUT)).clamp_(min=0.0).sum(-1)
    return mean, (phi + missing).clamp_(min=0.0)


def merge(parts_4KR: Tensor) -> RowState:
    """Eq. (9) over K parts, then (8)."""
    lse_z_K, lse_r_K, mean_K, phi_K = parts_4KR
    if parts_4KR.shape[1] == 1:
        lse_z, lse_r, mean, phi = parts_4KR[:, 0]
    else:
        lse_z, lse_r = lse_z_K.logsumexp(0), lse_r_K.logsumexp(0)
        w_K = lse_r_K.softmax(0)
        mean = (w_K * mean_K).sum(0)
        y_K = mean_K - mean
        rest = (w_K * y_K).sum(0)
        mean, y_K = mean + rest, y_K - rest
        small = (y_K < CUT) & (phi_K < LARGE)  # False for NaN
        accurate = w_K * (y_K.exp() * phi_K + y_K.expm1() - y_K)
        by_mass = (lse_z_K - lse_r - mean).exp() - w_K * (1 + y_K)
        phi = torch.where(small, accurate, by_mass).sum(0).clamp_(min=0.0)
    kl = phi.log1p()
    near = kl < LARGEST_KL  # False for NaN
    kl = torch.where(near, kl, (lse_z - lse_r - mean).clamp(min=0.0))
    return RowState(lse_z, lse_r, kl, torch.where(near, kl + mean, lse_z - lse_r))


def to_infinity(x: Tensor) -> Tensor:
    """Results that lean on LOWEST become the infinities they stand for."""
    return torch.where(x.abs() > -LOWEST / 10, torch.copysign(torch.full_like(x, math.inf), x), x)


def log_ratio_(y: Tensor, lse_z: Tensor, lse_r: Tensor, mean: Tensor, phi: Tensor) -> Tensor:
    """Turns y into log(p / q) within the part, in place, held above -F; returns what added to it gives log(p / q) of
    the whole, but for L - L'.

    By (8) it is y less the part's own KL. That is what is staged: it is small where p and q agree, whatever the
    other tiles do.
    """
    kl = torch.where(phi < LARGE, phi.log1p(), lse_z - lse_r - mean)
    y.sub_(kl[:, None]).clamp_(min=-largest_exponent(y.dtype))
    return mean + kl


def weigh_(p: Tensor, q: Tensor, t: Tensor, scratch: Tensor) -> None:
    """Rewrites p so that, with the t = log(p / q) that is kept, ``p e^-t`` is q to rounding, however far q is above p.

    ``p = q e^min(t, 0) + relu(p - q)``: where p >= q, p as it was; where q > p, q e^t. Uses up q.
    """
    torch.clamp(t, max=0.0, out=scratch).exp_().mul_(q)
    p.sub_(q).clamp_(min=0.0).add_(scratch)


class Extras:
    """Statistics of the policy's own distribution, over parts of the vocabulary: `reference.extra_statistics`."""

    def __init__(self, anchor_R: Tensor) -> None:
        self.anchor, self.total = anchor_R, torch.zeros_like(anchor_R)
        self.largest = torch.full_like(anchor_R, -math.inf)
        self.lse_k: list[Tensor] = []
        self.mean_k: list[Tensor] = []  # E_p[z] within the part

    def add(self, z: Tensor, p: Tensor, lse_z: Tensor) -> None:
        self.total = self.total + z.sum(-1)
        self.largest = torch.maximum(self.largest, z.amax(-1))
        self.lse_k.append(lse_z)
        self.mean_k.append(torch.linalg.vecdot(p, z))

    def results(self, lse_z: Tensor, z_y: Tensor, vocab: int) -> dict[str, Tensor]:
        parts = zip(self.lse_k, self.mean_k, strict=True)
        entropy = sum((lse_k - lse_z).exp() * (lse_z - mean_k) for lse_k, mean_k in parts)
        is_argmax = (z_y >= self.largest).to(z_y.dtype)
        return {"entropy": entropy, "mean_logit": to_infinity(self.total) / vocab + self.anchor, "is_argmax": is_argmax}
