r"""Row mathematics of one ``(R, C)`` tile of logits, in torch, in place: a tile made anew costs page faults. No
products, no loops, no labels.

A *part* is a slice of the vocabulary, at the least a column. Of each row of a part are kept: the largest logits
``z_top`` and ``r_top``, relative to them the log-sum-exps ``lse_z`` and ``lse_r`` and their difference, and the KL of
the part's own softmaxes. Relative to its own tops a part loses no digits to another part far above it.

With ``y = log p - log q``, the negative of delta', whatever p and q are,

    (8)   p - q = (p + q) tanh(y / 2)

loses no digits where they agree, and overflows nowhere. Parts k of masses P_k and Q_k, their anchors moved to the row's
own (`rebase`), merge by the chain rule, in any order, and no term is negative:

    (9)   KL = sum_k [ Q_k KL_k  +  P_k - Q_k - Q_k Y_k ]        Y_k = log P_k - log Q_k

A column is a part of KL 0, so that (9) says how a tile is summed as well: it is eq. (2a) of `reference.py`.

The Y_k want L - L' to more digits than the two are rounded to. Where the models nearly agree, and it matters, (8) with
all Y_k too large by e sums to e instead of 0. That *excess* is added to ``lse_z - lse_r``.

Over several parts backward's rows sum to 0 by it only if y is rounded there as it was in forward: `half_log_ratio_`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import Forward, Inputs, LMHead, Model

STEEP = 8.0  # log(p / q) above the negative of it throughout a tile: p e^-t is q to a few eps without being weighed
NEAR = 1.0  # tops no farther apart: what z - r is rounded by, half an eps of it, does not matter
ROUNDING = 0.125  # more than staging in 16 bits moves a sum of probabilities by, of itself
_MOVED = (math.log1p(-ROUNDING), math.log1p(ROUNDING))  # q, with both factors held, is right still
LOWEST = -1e30  # stands for -inf in a tile, so that inf - inf never happens


def apply_head_(out: Tensor, head: LMHead, bias: Tensor | None) -> Tensor:
    """Bias (the tile's columns of it, in its dtype), scale and softcap. Only a bias can rule an entry out: there -inf
    becomes `LOWEST`."""
    if bias is not None:
        out.add_(bias)
    if head.logit_scale != 1.0:
        out.mul_(head.logit_scale)
    if head.softcap is not None:
        out.mul_(1.0 / head.softcap).tanh_().mul_(head.softcap)
    return out if bias is None else out.clamp_(min=LOWEST)


def softcap_slope(z: Tensor, softcap: float, out: Tensor) -> Tensor:
    """d softcap * tanh(x / softcap) / dx = 1 - (z / softcap)^2."""
    torch.div(z, softcap, out=out)
    return out.mul_(out).neg_().add_(1.0)


def is_lowest(x: Tensor) -> Tensor:
    return x < LOWEST / 10


def finished(
    inputs: Inputs,
    logps_kl: Sequence[Tensor],
    extras: dict[str, Tensor],
    saved: tuple[Tensor | None, ...],
    state: tuple[Tensor, ...] = (),
) -> Forward:
    """What forward returns, of logp, ref_logp and KL; what leans on LOWEST is the infinity it stands for. Only a bias
    can put an entry at -inf."""
    shown = [*logps_kl, *(extras[name] for name in inputs.extras)]
    infinite = kl_is_infinite(inputs.policy, inputs.reference)
    if infinite is not None:
        shown[2] = shown[2].masked_fill(infinite, math.inf)
    if inputs.policy.head.bias is not None or inputs.reference.head.bias is not None:
        shown = [to_infinity(x) for x in shown]
    return Forward(*shown[:3], dict(zip(inputs.extras, shown[3:], strict=True)), saved, state)


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


def softmax(x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Puts the softmax of each row of the part, ``(..., C)``, into `out`. Returns the row's top, and its log-sum-exp
    relative to that: the top's probability is 1 / sum exp(x - top)."""
    torch.softmax(x, -1, out=out)
    return x.amax(-1), out.amax(-1).log_().neg_()


class Part(NamedTuple):
    """Of each row of a part, ``(R,)``, or of both models, ``(2, R)``; all but the tops are relative to them."""

    tops_2R: Tensor
    lse_2R: Tensor
    kl: Tensor
    lse_diff: Tensor  # of lse_2R, without cancellation


def divergence_(
    half_y: Tensor, p: Tensor, q: Tensor, p_less_q: Tensor, scratch: Tensor, dim: int = -1
) -> tuple[Tensor, Tensor]:
    """From y / 2, excess included: the excess, and the sum of (9) but for the parts' own KL. Puts ``p - q`` into
    `p_less_q`, which may be q itself, and uses up y / 2."""
    tanh = torch.tanh(half_y, out=scratch)
    half_y.mul_(q)
    excess = torch.add(p, q, out=p_less_q).mul_(tanh).sum(dim)
    return excess, torch.sub(p_less_q, half_y, alpha=2, out=half_y).sum(dim).clamp_(min=0.0)


def half_log_ratio_(logits_2RC: Tensor, tops_2R: Tensor, lse_diff: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """y / 2 of a tile into `out`, and what is left to take off the logits for them to be relative to the tops.

    In rows whose tops are near one another their difference is taken off last: z - r is the same number in every part
    that is near, too, and exact where the models nearly agree. Elsewhere the tops come first, and nothing is lost that
    the lesser of the two logits has; but each part rounds y in its own way.
    """
    apart_R = torch.sub(*tops_2R.unbind())
    far_R = apart_R.abs() > NEAR
    if apart_R.device.type != "cpu" or far_R.any():  # others would have to be waited for
        left_2R = tops_2R.masked_fill(far_R, 0.0)
        logits_2RC.sub_((tops_2R - left_2R)[..., None])
        tops_2R, apart_R = left_2R, torch.sub(*left_2R.unbind())
    torch.sub(*logits_2RC.unbind(), out=out).sub_(apart_R[:, None])
    return torch.add((-0.5 * lse_diff)[:, None], out, alpha=0.5, out=out), tops_2R


def merge(parts: list[Part]) -> Part:
    """Eq. (9) over K parts."""
    if len(parts) == 1:
        return parts[0]
    tops_2K, lse_2K, kl_K, diff_K = (_stacked(parts, name) for name in Part._fields)
    tops_2R = tops_2K.amax(1)
    lse_2K, gap_K = rebase(tops_2K, tops_2R, lse_2K)
    lse_2R = lse_2K.logsumexp(1)
    P_K, Q_K = (lse_2K - lse_2R[:, None]).exp_()
    lse_diff, kl = torch.sub(*lse_2R.unbind()), (Q_K * kl_K).sum(0)
    half_y_K = (diff_K + gap_K - lse_diff).mul_(0.5)
    excess, between = divergence_(half_y_K, P_K, Q_K, Q_K, torch.empty_like(P_K), dim=0)
    return Part(tops_2R, lse_2R, kl + between, lse_diff + excess)


def rebase(tops_2K: Tensor, tops_2R: Tensor, lse_2K: Tensor) -> tuple[Tensor, Tensor]:
    """Both models' log-sum-exps of the parts, relative to the row's tops instead of the parts', and what that adds to
    their difference: where `half_log_ratio_` takes off the difference of the tops, that of the two differences."""
    shift_2K, apart_K, apart_R = tops_2K - tops_2R[:, None], torch.sub(*tops_2K.unbind()), torch.sub(*tops_2R.unbind())
    near_K = torch.maximum(apart_K.abs(), apart_R.abs()) <= NEAR
    return lse_2K + shift_2K, torch.where(near_K, apart_K - apart_R, torch.sub(*shift_2K.unbind()))


def _stacked(parts: Sequence[NamedTuple], name: str) -> Tensor:
    """One field of K parts, ``(..., K, R)``."""
    return torch.stack([getattr(part, name) for part in parts], -2)


def to_infinity(x: Tensor) -> Tensor:
    """Results that lean on LOWEST become the infinities they stand for."""
    return torch.where(x.abs() > -LOWEST / 10, torch.copysign(torch.full_like(x, math.inf), x), x)


def within(parts: list[Part], whole: Part) -> Tensor:
    """``(3, K, R)``: of each part its P and Q within the whole, and ``Q - P`` without cancellation."""
    masses_2k, ratio_k = _masses(parts, whole)
    return torch.cat([masses_2k, difference(*masses_2k, -ratio_k)[None]])


def _masses(parts: list[Part], whole: Part) -> tuple[Tensor, Tensor]:
    """``(2, K, R)``: P and Q; and ``(K, R)``: ``log(P / Q)``."""
    lse_2k, gap_k = rebase(_stacked(parts, "tops_2R"), whole.tops_2R, _stacked(parts, "lse_2R"))
    return (lse_2k - whole.lse_2R[:, None]).exp_(), _stacked(parts, "lse_diff") + gap_k - whole.lse_diff


def difference(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """``q - p`` by (8), from ``log(q / p)``."""
    return (p + q).mul_(torch.tanh(0.5 * log_ratio))


# --- what is staged of a part: p and t = log(p / q), for a q far below p has no digits in p - q -----------------------


def subtract_(y: Tensor, excess_R: Tensor) -> None:
    """Turns y into t = log(p / q) within the part, held above -F. It is small where p and q agree, whatever the other
    parts do."""
    y.sub_(excess_R[:, None]).clamp_(min=-largest_exponent(y.dtype))


def is_steep(half_y: Tensor) -> bool:
    """Whether p may be far below q. Said (True) of a device that would have to be waited for."""
    if half_y.device.type != "cpu":
        return True
    return half_y.numel() > 0 and not half_y.amin().item() > -STEEP / 2  # NaN is steep


def tile_weights(roundings: list[Rounding], parts: list[Part], whole: Part) -> Tensor:
    """``(3, K, R)``: of each part its P and Q within the whole, and the ratio ``log(P / Q)`` that added to a column's t
    makes its log(p / q) within the whole. Where P and Q are far apart, and the sum would have fewer digits than t,
    the ratio is 0; where they are not, it tells them apart, and P stands for both. Made up for `roundings`, if any."""
    (weight_k, ref_weight_k), ratio_k = _masses(parts, whole)
    near_k = ratio_k.abs() < 1
    ref_weight_k = torch.where(near_k, weight_k, ref_weight_k)
    weights_3k = torch.stack([weight_k, ref_weight_k, torch.where(near_k, ratio_k, 0.0)])
    if roundings:
        factor_k, moved_k = _made_up(roundings)
        weights_3k[:2] *= factor_k
        weights_3k[2] += moved_k
    return weights_3k


def weigh_(p: Tensor, q: Tensor, t: Tensor, scratch: Tensor) -> None:
    """Rewrites p so that, with the t = log(p / q) that is kept, ``p e^-t`` is q to rounding, however far q is above p.

    ``p = q e^min(t, 0) + relu(p - q)``: where p >= q, p as it was; where q > p, q e^t. Uses up q.
    """
    torch.clamp(t, max=0.0, out=scratch).exp_().mul_(q)
    p.sub_(q).clamp_(min=0.0).add_(scratch)


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

    def add(self, z: Tensor, p: Tensor, top: Tensor, lse: Tensor, scratch: Tensor) -> None:
        """A part, its softmax, and what `softmax` returned of it."""
        z = torch.sub(z, top[:, None], out=scratch)
        self.parts.append((top, lse, torch.linalg.vecdot(p, z)))
        self.total = torch.add(z.sum(-1), top, alpha=z.shape[1]) + self.total

    def results(self, top: Tensor, lse: Tensor, z_y: Tensor, vocab: int) -> dict[str, Tensor]:
        """From the whole's top and log-sum-exp, and the label's logit."""
        entropy = 0.0
        for top_k, lse_k, mean_k in self.parts:
            shift_k = top_k - top
            entropy += (lse_k + shift_k - lse).exp() * (lse - (mean_k + shift_k))
        is_argmax = (z_y >= top).to(z_y.dtype)
        return {"entropy": entropy, "mean_logit": to_infinity(self.total) / vocab, "is_argmax": is_argmax}
