r"""Row mathematics of one ``(R, C)`` tile of logits, in torch, in place: a tile made anew costs page faults. No
products, no loops, no labels.

A *part* is a slice of the vocabulary. Of each row of a part six numbers are kept: the largest logits ``z_top`` and
``r_top``, and relative to them the log-sum-exps ``lse_z`` and ``lse_r``, the mean ``mu = E_q[z - r]`` under the part's
own softmax of r, and ``M = E_q[expm1(y) - y] >= 0`` with ``y = z - r - mu``: eq. (2b) of `reference.py` with the sign
of delta turned, so that its exponential needs no negation. Being *anchored* at its own top, a part loses no digits to
an offset between the models, nor to another part far above it. Then, for a part as for the whole,

    (8)   KL = log1p(M)        L - L' = KL + mu        E_q[e^y] = 1 + M = exp(lse_z - lse_r - mu)

where, with M about it, any other centre may stand for mu and ``L - L' - mu`` for KL: beyond FAR nats mu has none of the
digits that the columns have, and FAR is their centre.

Parts k, their anchors moved to the row's own (`rebase`), merge exactly, in any order, with ``w = softmax_k(lse_r_k)``,
``mu = sum w_k mu_k`` and ``Y_k = mu_k - mu``:

    (9)   M = sum_k [ w_k (e^Y_k M_k + expm1(Y_k) - Y_k) ]  =  sum_k [ exp(lse_z_k - L' - mu) - w_k (1 + Y_k) ]

where the second form is for large terms: it asks nothing of a part's own M, which overflows where the reference all
but rules out what the policy likes. A single column is a part with M = 0, so (9) also says how a tile is summed:
there the exponent is cut at CUT, and what that leaves out is ``relu(p_v exp(lse_z - lse_r - mu) - q_v e^CUT)``,
zero, but for rounding, wherever nothing was cut. Where a whole tile is NARROW (the rule in training) there is nothing
to cut and nothing to weigh; that is looked up where looking costs no synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import Model

CUT = 16.0
NARROW = 4.0  # |y| of a tile below it: e^y needs no cut, and p e^-t is q to a few eps without being weighed
LARGE = 1e12  # terms of (9) above it are summed in their second form
FAR = 48.0  # a part of mean below -FAR is centred there: its M is LARGE, and finite, about either
ROUNDING = 0.125  # more than staging in 16 bits moves a sum of probabilities by, of itself
_MOVED = (math.log1p(-ROUNDING), math.log1p(ROUNDING))  # q, with both factors held, is right still
LOWEST = -1e30  # stands for -inf in a tile, so that inf - inf never happens


@dataclass(frozen=True)
class RowState:
    """The whole vocabulary's parts merged, ``(R,)``; a pair ``(2, R)`` is the policy's and the reference's."""

    tops_2R: Tensor
    lse_2R: Tensor  # relative to the tops, as the others are
    kl: Tensor
    lse_diff: Tensor  # L - L', without cancellation


def is_lowest(x: Tensor) -> Tensor:
    return x < LOWEST / 10


def kl_is_infinite(policy: Model, reference: Model) -> Tensor | None:
    """Whether the policy rules out what the reference allows. It does so in all rows or in none (None: it cannot),
    since only a bias rules out, and only where there is no softcap."""
    out, ref_out = _ruled_out(policy), _ruled_out(reference)
    if out is None:
        return None
    return (out if ref_out is None else out & ~ref_out).any()


def _ruled_out(model: Model) -> Tensor | None:
    """``(V,)``."""
    head = model.head
    if head.bias is None or head.softcap is not None:
        return None
    return is_lowest(head.bias.detach().to(model.dtype).float() * head.logit_scale)


def largest_exponent(dtype: torch.dtype) -> float:
    """F: log-ratios are held above -F. e^-F is far below rounding, and e^(2F) leaves room for cotangents in `dtype`."""
    return -0.345 * math.log(torch.finfo(dtype).tiny)


def softmax_(x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Anchors each row of the part, ``(..., C)``, and puts its softmax into `out`. Returns its top, and its log-sum-exp
    relative to that: the top's probability is 1 / sum exp(x - top)."""
    top = x.amax(-1)
    torch.softmax(x.sub_(top[..., None]), -1, out=out)
    return top, out.amax(-1).log_().neg_()


class Part(NamedTuple):
    """Of each row of a part, ``(R,)``, or of both models, ``(2, R)``; all but the tops are relative to them."""

    tops_2R: Tensor
    lse_2R: Tensor
    mean: Tensor
    phi: Tensor  # M
    kl: Tensor
    lse_diff: Tensor  # of lse_2R, without cancellation
    excess: Tensor  # what y is above log(p / q) within the part


def divergence_(z: Tensor, r: Tensor, p: Tensor, q: Tensor, ends_2: tuple[Tensor, Tensor]) -> tuple[Part, bool]:
    """The part, and whether it `is_narrow`; leaves in r ``y = z - r``, centred. z is scratch. The ends, of both, are
    what `softmax_` returned.

    A narrow tile's centre is L - L', with which y is log(p / q), ``E_q[y] = -KL`` and eq. (2a) the KL. What is left
    over, ``e = E_q[y] + KL``, is the rounding of L and L', and (2a) off by ``expm1(e) - e``: nothing. Any other tile is
    centred by about mu, or by -FAR if that is more.
    """
    lse_z, lse_r = ends_2[1].unbind()
    centre = lse_z - lse_r
    y = torch.sub(z, r, out=r).sub_(centre[:, None])
    rest = torch.mul(q, y, out=z).sum(-1)
    if is_narrow(y):
        kl = torch.expm1(y, out=z).sub_(y).mul_(q).sum(-1)
        kl.clamp_(min=0.0)
        excess = rest + kl
        return Part(*ends_2, centre + rest, kl.expm1(), kl, centre + excess, excess), True
    shift = torch.maximum(rest, -FAR - centre)
    centre += shift
    y.sub_(shift[:, None])
    rest = torch.mul(q, y, out=z).sum(-1)  # a second time leaves no trace of q's sum not being 1
    mean = centre + rest
    held = rest.clamp(min=-1.0)  # all of it, unless the mean is far
    centre += held
    y.sub_(held[:, None])
    terms = torch.clamp(y, max=CUT, out=z).expm1_().sub_(y).mul_(q)
    phi = terms.sum(-1)
    mass = (lse_z - lse_r - centre).exp_()
    torch.mul(p, mass[:, None], out=terms)
    missing = terms.sub_(q, alpha=math.exp(CUT)).clamp_(min=0.0).sum(-1)
    phi = (phi + missing).clamp_(min=0.0)
    excess = _kl(lse_z, lse_r, centre, phi)
    return Part(*ends_2, mean, phi, excess - (rest - held), centre + excess, excess), False


def is_narrow(y: Tensor) -> bool:
    """Whether |y| < NARROW everywhere. Not asked (False) of a device that would have to be waited for."""
    if y.device.type != "cpu":
        return False
    lowest, highest = (x.item() for x in torch.aminmax(y))
    return -NARROW < lowest and highest < NARROW  # False for NaN


def _kl(lse_z: Tensor, lse_r: Tensor, mean: Tensor, phi: Tensor) -> Tensor:
    """Eq. (8); where 1 + M nears what fp32 holds, L - L' - mu, which no longer cancels there."""
    return torch.where(phi < LARGE, phi.log1p(), lse_z - lse_r - mean)


def merge(parts: list[Part]) -> RowState:
    """Eq. (9) over K parts, then (8)."""
    if len(parts) == 1:
        only = parts[0]
        return RowState(only.tops_2R, only.lse_2R, only.kl, only.lse_diff)
    tops_2K, lse_2K, mean_K, phi_K = (_stacked(parts, name) for name in ("tops_2R", "lse_2R", "mean", "phi"))
    tops_2R = tops_2K.amax(1)
    lse_2K, gap_K = rebase(tops_2K, tops_2R, lse_2K)
    mean_K = mean_K + gap_K
    lse_2R = lse_2K.logsumexp(1)
    (lse_z_K, lse_r_K), (lse_z, lse_r) = lse_2K, lse_2R
    w_K = lse_r_K.softmax(0)
    mean = (w_K * mean_K).sum(0)
    y_K = mean_K - mean
    rest = (w_K * y_K).sum(0)
    mean, y_K = mean + rest, y_K - rest
    small = (y_K < CUT) & (phi_K < LARGE)  # False for NaN
    accurate = w_K * (y_K.exp() * phi_K + y_K.expm1() - y_K)
    by_mass = (lse_z_K - lse_r - mean).exp() - w_K * (1 + y_K)
    phi = torch.where(small, accurate, by_mass).sum(0).clamp_(min=0.0)
    kl = _kl(lse_z, lse_r, mean, phi)
    return RowState(tops_2R, lse_2R, kl, torch.where(phi < LARGE, mean + kl, lse_z - lse_r))


def rebase(tops_2K: Tensor, tops_2R: Tensor, lse_2K: Tensor) -> tuple[Tensor, Tensor]:
    """Both models' log-sum-exps of the parts, relative to the row's tops instead of the parts', and what that adds to
    a difference z - r. Tops near one another differ exactly."""
    shift_2K = tops_2K - tops_2R[:, None]
    return lse_2K + shift_2K, shift_2K[0] - shift_2K[1]


def _stacked(parts: Sequence[NamedTuple], name: str) -> Tensor:
    """One field of K parts, ``(..., K, R)``."""
    return torch.stack([getattr(part, name) for part in parts], -2)


def to_infinity(x: Tensor) -> Tensor:
    """Results that lean on LOWEST become the infinities they stand for."""
    return torch.where(x.abs() > -LOWEST / 10, torch.copysign(torch.full_like(x, math.inf), x), x)


def subtract_(y: Tensor, excess_R: Tensor) -> None:
    """Turns y into t = log(p / q) within the part, held above -F. It is small where p and q agree, whatever the other
    parts do."""
    y.sub_(excess_R[:, None]).clamp_(min=-largest_exponent(y.dtype))


def tile_weights(parts: list[Part], roundings: list[Rounding], whole: RowState) -> Tensor:
    """``(3, K, R)``: of each part its P and Q within the whole, and the ratio ``log(P / Q)`` that added to a column's t
    makes its log(p / q) within the whole. Where P and Q are far apart, and the sum would have fewer digits than t,
    the ratio is 0; where they are not, it tells them apart, and P stands for both."""
    weights_3k = within(parts, whole)
    if roundings:
        factor_k, moved_k = _made_up(roundings)
        weights_3k[:2] *= factor_k
        weights_3k[2] += moved_k
    return weights_3k


def within(parts: list[Part], whole: RowState) -> Tensor:
    """``(3, K, R)``: P, Q, and their log-ratio where they are near one another, else 0."""
    lse_2k, gap_k = rebase(_stacked(parts, "tops_2R"), whole.tops_2R, _stacked(parts, "lse_2R"))
    ratio_k = _stacked(parts, "lse_diff") + gap_k - whole.lse_diff
    weight_k, ref_weight_k = (lse_2k - whole.lse_2R[:, None]).exp_()
    near_k = ratio_k.abs() < 1
    return torch.stack([weight_k, torch.where(near_k, weight_k, ref_weight_k), torch.where(near_k, ratio_k, 0.0)])


def weigh_(p: Tensor, q: Tensor, t: Tensor, scratch: Tensor) -> None:
    """Rewrites p so that, with the t = log(p / q) that is kept, ``p e^-t`` is q to rounding, however far q is above p.

    ``p = q e^min(t, 0) + relu(p - q)``: where p >= q, p as it was; where q > p, q e^t. Uses up q.
    """
    torch.clamp(t, max=0.0, out=scratch).exp_().mul_(q)
    p.sub_(q).clamp_(min=0.0).add_(scratch)


def difference(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """``q - p``, where they agree from ``log(q / p)``."""
    return torch.where(log_ratio < 1, p * torch.expm1(log_ratio), q - p)


class Rounding(NamedTuple):
    """What becomes of a part's sums when its p and t are staged in 16 bits, without the label: ``(R,)`` each."""

    kept: Tensor  # sum of p before
    p_y: Tensor  # of the label, 0 if it is elsewhere
    q_y: Tensor
    ratio_y: Tensor  # log(q_y / p_y)
    total: Tensor  # sum of p after
    more: Tensor  # what the sum of q is above that of p, after


def rounding(p: Tensor, t: Tensor, kept: Tensor, label: tuple[Tensor, Tensor, Tensor], scratch: Tensor) -> Rounding:
    more = torch.neg(t, out=scratch).expm1_().mul_(p).sum(-1)
    return Rounding(kept, *label, p.sum(-1), more)


def _made_up(roundings: list[Rounding]) -> tuple[Tensor, Tensor]:
    """``(K, R)``: the factor to parts' weights, and the ratio to add, that give their p and q the sums they had.

    Entries that share a log-ratio round alike, and the rows of their dz would not sum to 0. Before, too, the sum of q
    is had as what it is above that of p: where they are equal, or nearly so, so are the moves.
    """
    kept_k, p_k, q_k, ratio_k, total_k, more_k = (_stacked(roundings, name) for name in Rounding._fields)
    tiny = torch.finfo(kept_k.dtype).tiny
    kept_k, total_k = kept_k.clamp_(min=tiny), total_k.clamp_(min=tiny)
    before_k = _log_more(-difference(p_k, q_k, ratio_k) / kept_k)
    moved_k = (_log_more(more_k / total_k) - before_k).clamp_(*_MOVED)
    return (kept_k / total_k).clamp_(1 - ROUNDING, 1 + ROUNDING), moved_k


def _log_more(x: Tensor) -> Tensor:
    return x.clamp_(min=-1 + 1e-6).log1p_()


class Extras:
    """Statistics of the policy's own distribution, over parts of the vocabulary: `reference.extra_statistics`."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []  # top, lse and E_p[z], the latter two relative to it
        self.total: Tensor | float = 0.0

    def add(self, z: Tensor, p: Tensor, ends_2: tuple[Tensor, Tensor]) -> None:
        """An anchored part, its softmax, and what `softmax_` returned of both models."""
        top, lse = ends_2[0][0], ends_2[1][0]
        self.parts.append((top, lse, torch.linalg.vecdot(p, z)))
        self.total = torch.add(z.sum(-1), top, alpha=z.shape[1]) + self.total

    def results(self, whole: RowState, z_y: Tensor, vocab: int) -> dict[str, Tensor]:
        entropy, top, lse = 0.0, whole.tops_2R[0], whole.lse_2R[0]
        for top_k, lse_k, mean_k in self.parts:
            shift_k = top_k - top
            entropy += (lse_k + shift_k - lse).exp() * (lse - (mean_k + shift_k))
        is_argmax = (z_y >= top).to(z_y.dtype)
        return {"entropy": entropy, "mean_logit": to_infinity(self.total) / vocab, "is_argmax": is_argmax}
