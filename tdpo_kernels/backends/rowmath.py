r"""Turn tiles of logits into states of parts, states into rows, and rows into gradients, in torch.

Equations are those of `reference.py`; `device/math.py` has them for Triton. The state of a part is one tensor
``(STATE, R)``. It has for each row the largest logits ``top_z`` and ``top_r``, the log-sum-exps ``lse_z`` and ``lse_r``
relative to them, the KL of the part's own two softmaxes, and ``gap = lse_z - lse_r`` without cancellation. With
`extras` the entropy of the policy's softmax within the part and the sum of its logits follow.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Extras, Workspace

WHOLE = 8  # rows of `Whole.row`
STATE = 6  # rows of a part's state; two more with extras
ROW = 9  # rows of `cotangents`: tops, lse (2 each), gap, a, b, c, dz at the label
LOWEST = -1e30  # stands for -inf in a tile, so that inf - inf never happens
NEAR = 0.35  # |y| up to which psi(y) is taken by its series
FAR = 8.0  # y from which p - q no longer cancels, and q e^y would lose digits
GROUP = 32  # parts that are merged at once


def is_lowest(x: Tensor) -> Tensor:
    """Return where x stands for -inf. fp16 holds no number as low, so it is compared in fp32."""
    return (x.float() if x.dtype == torch.float16 else x) < LOWEST / 10


def exact_difference_(z: Tensor, r: Tensor, top_z: Tensor, top_r: Tensor, gap: Tensor, out: Buffers) -> Tensor:
    """Return ``y = (z - top_z) - (r - top_r) - gap`` in ``out.y``, without an error before the gap is subtracted.

    ``z - r`` is split into the rounded difference and its error (Knuth's two-sum), and so is ``top_z - top_r``.
    """
    apart, error = _two_difference(top_z, top_r)
    y, b, e = torch.sub(z, r, out=out.y), out.one, out.two
    torch.sub(y, z, out=b)
    torch.sub(y, b, out=e)
    torch.sub(z, e, out=e)
    e.sub_(b.add_(r)).sub_(error)
    return y.sub_(apart).add_(e).sub_(gap)


def _two_difference(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x - y`` rounded, and the rounding error."""
    s = x - y
    b = s - x
    return s, (x - (s - b)) - (y + b)


def psi_series_(y: Tensor, more: Tensor, out: Tensor) -> Tensor:
    """Return ``psi(y) + more`` for |y| <= NEAR, to the digits of the dtype."""
    terms = 8 if y.dtype == torch.float32 else 14
    one = y.new_ones(())
    torch.add(one, y, alpha=1 / terms, out=out)
    for n in range(terms - 1, 2, -1):
        torch.addcmul(one, out, y, value=1 / n, out=out)
    return torch.addcmul(more, out.mul_(y), y, value=0.5, out=out)


class Buffers(NamedTuple):
    """Hold scratch tensors of a tile's shape."""

    q: Tensor
    y: Tensor
    one: Tensor
    two: Tensor
    three: Tensor


def buffers(z: Tensor, work: Workspace | None = None) -> Buffers:
    """Return scratch in the shape and dtype of z, from a workspace if there is one."""
    if work is None:
        return Buffers(*(torch.empty_like(z) for _ in Buffers._fields))
    return Buffers(*(work.get(f"scratch {name}", z.dtype, *z.shape) for name in Buffers._fields))


def reaches_far(y: Tensor) -> bool:
    """Return whether any y may be FAR or more: True on a GPU, because an answer would have to be waited for."""
    return y.device.type != "cpu" or (y.numel() > 0 and not y.amax().item() < FAR)


def divergence_(p: Tensor | None, out: Buffers, dim: int) -> tuple[Tensor, Tensor]:
    """Return the sums over `dim` of ``Q psi(Y)`` and of ``P - Q``, eq. (8), from ``Q = out.q`` and ``Y = out.y``.

    With n = Y clamped to NEAR, ``psi(Y) = psi(n) + (e^Y - e^n) - (Y - n)``: the series alone where Y is near 0, and no
    cancellation beyond. A choice between two forms for each element would cost more than either. p is P, in the units
    of Q, or None where no Y is FAR.
    """
    q, y, near, psi, less = out
    torch.clamp(y, -NEAR, NEAR, out=near)
    torch.exp(near, out=psi)
    grown = torch.exp(y if p is None else torch.clamp(y, max=FAR, out=less), out=less).sub_(psi)
    psi_series_(near, grown, psi)
    torch.add(psi, near, out=less)  # e^Y - 1
    psi.sub_(y.sub_(near)).mul_(q)
    less.mul_(q)
    if p is not None:
        far, exact = y >= FAR - NEAR, p - q
        less = torch.where(far, exact, less)
        psi = torch.where(far, exact.sub_(y.add_(NEAR).mul_(q)), psi)
    return psi.sum(dim), less.sum(dim)


def part(z: Tensor, r: Tensor, extras: Extras, work: Workspace) -> Tensor:
    """Return the state ``(STATE, R)`` of a tile of logits ``(R, C)``, LOWEST in both where a column does not count."""
    out = buffers(z, work)
    top_z, top_r = z.amax(-1), r.amax(-1)
    p = torch.sub(z, top_z[:, None], out=out.one)
    more = _entropy_sums(z, p, out.two) if extras else []
    sum_z = p.exp_().sum(-1)
    sum_r = torch.sub(r, top_r[:, None], out=out.q).exp_().sum(-1)
    lse_z, lse_r = sum_z.log(), sum_r.log()
    gap = lse_z - lse_r
    y = exact_difference_(z, r, top_z[:, None], top_r[:, None], gap[:, None], out)
    p = _softmax(z, top_z, lse_z).mul_(sum_r[:, None]) if reaches_far(y) else None
    kl, excess = divergence_(p, out, -1)
    kl, excess = kl / sum_r, excess / sum_r
    state = [top_z, top_r, lse_z, lse_r, (kl - 0.5 * excess * excess).clamp_(min=0.0), gap + excess]
    if more:
        weighted, total = more
        state += [lse_z - weighted / sum_z, total]
    return torch.stack(state)


def _entropy_sums(z: Tensor, down: Tensor, scratch: Tensor) -> list[Tensor]:
    """Return the sum of ``e^down down``, where down is z less its top, and the sum of the logits that count."""
    weighted = torch.exp(down, out=scratch).mul_(down).sum(-1)
    return [weighted, torch.where(is_lowest(z), 0.0, z).sum(-1)]


def _softmax(x: Tensor, top: Tensor, lse: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.sub(x, top[:, None], out=out).sub_(lse[:, None]).exp_()


def merge(parts: Tensor) -> Tensor:
    """Return the state ``(STATE, R)`` of K parts ``(K, STATE, R)`` together by eq. (8), merging GROUP at a time."""
    while (K := parts.shape[0]) > 1:
        groups = -(-K // GROUP)
        each = GROUP if groups > 1 else K
        if missing := groups * each - K:
            parts = torch.cat([parts, empty(parts).expand(missing, -1, -1)])
        parts = _merge(parts.view(groups, each, *parts.shape[1:]))
    return parts[0]


def empty(like: Tensor) -> Tensor:
    """Return the state ``(STATE, R)`` of a part without columns, beside parts like ``(..., STATE, R)``."""
    state = like.new_zeros(like.shape[-2:])
    state[:2] = LOWEST
    return state


def _merge(parts_GKSR: Tensor) -> Tensor:
    """Return the state ``(G, STATE, R)`` of each group's K parts together."""
    top_z_K, top_r_K, lse_z_K, lse_r_K, kl_K, gap_K, *extras = parts_GKSR.unbind(2)
    top_z, top_r = top_z_K.amax(1, keepdim=True), top_r_K.amax(1, keepdim=True)
    log_P_K, log_Q_K = lse_z_K + (top_z_K - top_z), lse_r_K + (top_r_K - top_r)
    lse_z, lse_r = log_P_K.logsumexp(1, keepdim=True), log_Q_K.logsumexp(1, keepdim=True)
    out, gap = buffers(log_P_K), lse_z - lse_r
    exact_difference_(top_z_K, top_r_K, top_z, top_r, gap - gap_K, out)
    P_K, Q_K = (log_P_K - lse_z).exp_(), torch.sub(log_Q_K, lse_r, out=out.q).exp_()
    own = (Q_K * kl_K).sum(1)
    kl, excess = divergence_(P_K, out, 1)
    kl = (own + kl - 0.5 * excess * excess).clamp_(min=0.0)
    state = [*(x.squeeze(1) for x in (top_z, top_r, lse_z, lse_r)), kl, gap.squeeze(1) + excess]
    if extras:
        entropy_K, total_K = extras
        state += [(P_K * (entropy_K - (log_P_K - lse_z))).sum(1), total_K.sum(1)]
    return torch.stack(state, 1)


# --- the whole row ----------------------------------------------------------------------------------------------------


class Whole(NamedTuple):
    """Hold each row's statistics over the whole vocabulary."""

    shown: Tensor  # (F, T): logp, kl, ref_logp, then the extras
    row: Tensor  # (WHOLE, T), for `cotangents`: tops, lse and gap of the whole; P_0, Q_0, p_y - q_y


def whole(others: Tensor, labels_2T: Tensor, extras: Extras, vocab: int) -> Whole:
    """Return eqs. (1) and (2) from the state of all columns but the label, and the label's two logits.

    The label is a part of its own, so ``1 - p_y = P_0`` and nothing cancels however sure a model is.
    """
    z_y, r_y = labels_2T.unbind()
    label = torch.zeros_like(others)
    label[:2] = labels_2T
    parts = torch.stack([others, label])
    state = merge(parts)
    top_z, top_r, lse_z, lse_r, kl, gap = state[:STATE].unbind()
    Y_2T = exact_difference_(parts[:, 0], parts[:, 1], top_z, top_r, gap - parts[:, 5], buffers(parts[:, 0]))
    down, lost = _two_difference(others[:2], labels_2T)
    odds, lost_too = _two_difference(down, -others[2:4])
    (x_z, x_r), lost = odds, lost.add_(lost_too)
    P_0, logp = _against_label(x_z, lost[0])  # each model by itself, for the same bits of both
    Q_0, ref_logp = _against_label(x_r, lost[1])
    p_y, q_y = torch.sigmoid(-x_z), torch.sigmoid(-x_r)
    elsewhere, at_label = _difference(torch.stack([P_0, p_y]), torch.stack([Q_0, q_y]), Y_2T)
    row = [*state[:4], gap, P_0, Q_0, torch.where(q_y > Q_0, -elsewhere, at_label)]
    more = _extras(extras, others, z_y, logp, x_z, vocab) if extras else ()
    return Whole(torch.stack([logp, kl, ref_logp, *more]), torch.stack(row))


def _against_label(x: Tensor, lost: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mass of all others and the log-probability of the label, whose log-odds against them are x.

    What rounding takes from x is put back: at 30 nats it would be 15 eps of ``sigmoid(x)``.
    """
    mass_0 = torch.sigmoid(x)
    loss = torch.addcmul(F.softplus(x, threshold=40), lost, mass_0)
    return torch.addcmul(mass_0, lost * mass_0, 1.0 - mass_0), -loss


def with_infinities(shown: Tensor, extras: Extras, ruled_out_2: Tensor) -> Tensor:
    """Return `shown` with infinities where LOWEST stands for one, given the result of `logits.ruled_out`.

    A KL that must be inf is not found by its size: 1e30 times a tiny q looks finite. Only a bias rules a token out, so
    either all rows have an infinite KL or none has.
    """
    missed, any_out = ruled_out_2.unbind()
    logp, kl, ref_logp, *more = shown
    more = [
        x.masked_fill(any_out, -math.inf) if name == "mean_logit" else x for name, x in zip(extras, more, strict=True)
    ]
    logp, ref_logp = (x.masked_fill(is_lowest(x), -math.inf) for x in (logp, ref_logp))
    return torch.stack([logp, kl.masked_fill(missed, math.inf), ref_logp, *more])


def _difference(p: Tensor, q: Tensor, y: Tensor) -> Tensor:
    """Return ``p - q``, from ``y = log p - log q`` where they nearly agree."""
    return torch.where(y.abs() < NEAR, q * torch.expm1(y.clamp(-1.0, 1.0)), p - q)


def _extras(wanted: Extras, others: Tensor, z_y: Tensor, logp: Tensor, x_z: Tensor, vocab: int) -> list[Tensor]:
    entropy_0, total = others[STATE:].unbind()
    found = {
        "entropy": torch.sigmoid(x_z) * (entropy_0 + F.softplus(-x_z, threshold=40)) - torch.sigmoid(-x_z) * logp,
        "mean_logit": (total + z_y) / vocab,
        "is_argmax": (z_y >= others[0]).to(z_y.dtype),
    }
    return [found[name] for name in wanted]


def cotangents(row: Tensor, g_logp_T: Tensor | None, g_kl_T: Tensor | None, scale: float) -> Tensor:
    """Return the values ``(ROW, T)`` of each row that eq. (9) needs, for a dz multiplied by `scale`.

    c is computed before scaling, which would round away the difference of nearly equal cotangents.
    """
    zero = torch.zeros_like(row[0])
    g_logp, g_kl = (zero if g is None else g.to(row.dtype) for g in (g_logp_T, g_kl_T))
    a, b, c = g_kl * -scale, g_logp * -scale, (g_kl - g_logp) * scale
    P_0, Q_0, more_y = row[5:].unbind()
    label = torch.where(mostly_p(a, c), -b * P_0 - a * more_y, c * more_y - b * Q_0)
    return torch.cat([row[:5], torch.stack([a, b, c, label])])


def mostly_p(a: Tensor, c: Tensor) -> Tensor:
    """Return where a is small beside c, so that the second line of eq. (9) has more digits."""
    return 2 * a.abs() < c.abs()


# --- backward: dz of a tile by eq. (9), except at the label -----------------------------------------------------------


def dz_from_one_(x: Tensor, m: int, row: Tensor, dz: Tensor) -> None:
    """Set ``dz = b p`` (m = 0: a is 0 in all rows, x are the policy's logits) or ``dz = b q`` (m = 1: c is 0)."""
    _softmax(x, row[m], row[2 + m], dz).mul_(row[6, :, None])


def dz_from_both_(z: Tensor, r: Tensor, row: Tensor, out: Buffers) -> None:
    """Set ``out.one`` to dz by eq. (9), for any row."""
    top_z, top_r, lse_z, lse_r, gap, a, b, c, _ = row[..., None].unbind()
    y = exact_difference_(z, r, top_z, top_r, gap, out)
    q = _softmax(r, top_r[:, 0], lse_r[:, 0], out.q)
    far, rows = reaches_far(y), mostly_p(a, c)
    dz = torch.expm1(torch.clamp(y, max=FAR, out=out.one) if far else y, out=out.one).mul_(c).add_(b).mul_(q)
    if far or rows.any():
        p = _softmax(z, top_z[:, 0], lse_z[:, 0], out.two)
        torch.where((y >= FAR) | rows, p.mul_(c).add_(q.mul_(a)), dz, out=out.one)


def softcap_slope(x: Tensor, softcap: float) -> Tensor:
    """Return the derivative ``sech^2(x / softcap)`` of the cap at the logit before it."""
    e = torch.exp(x.abs().mul_(-2.0 / softcap))
    return e.mul(4.0).div_(e.add_(1.0).square_())
