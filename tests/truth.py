"""The truth of a problem, by eqs. (1), (2a), (6), (7), in numpy's longdouble: 80 bits on x86."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from cases import Cotangents, Problem
from torch import Tensor

from tdpo_kernels import LMHead

Array = np.ndarray


def exact(x: Tensor) -> Array:
    return x.detach().cpu().double().numpy().astype(np.longdouble)


def round_cotangents(problem: Problem, cotangents: Cotangents) -> Cotangents:
    device = problem.hidden.device
    return tuple(g if g is None else g.to(device, problem.stats_dtype) for g in cotangents)


@dataclass(frozen=True)
class Result:
    """Statistics at the T labels that count; gradients, None where there is none."""

    logp: Array
    ref_logp: Array
    kl: Array
    hidden: Array
    weight: Array
    bias: Array | None

    NAMES = ("logp", "ref_logp", "kl", "hidden", "weight", "bias")
    STATISTICS = NAMES[:3]


@dataclass(frozen=True)
class Truth:
    result: Result
    scale: dict[str, Array]  # of each statistic, per token; of the bias's gradient
    dz: Array  # (T, V), at the logits
    size: Array  # (T, V), of what each entry of dz is a sum of, for where that vanishes in all columns of a row at once


def truth(problem: Problem, cotangents: Cotangents) -> Truth:
    at, by = problem.rows()
    y = problem.labels.flatten()[at].cpu().numpy()
    t = np.arange(len(y))
    hidden, weight = exact(problem.hidden.flatten(0, -2))[by.numpy()], exact(problem.head.weight)
    z, slope = _logits(hidden, problem.head)
    r, _ = _logits(exact(problem.ref_hidden.flatten(0, -2))[by.numpy()], problem.ref_head)
    log_p, log_q = log_softmax(z), log_softmax(r)
    p, q = np.exp(log_p), np.exp(log_q)
    difference, terms = difference_of(log_p, log_q, p, q)
    kl = terms.sum(-1)

    g_logp, g_kl = (
        np.zeros(len(y), np.longdouble) if g is None else exact(g.flatten()[at.to(g.device)])
        for g in round_cotangents(problem, cotangents)
    )
    dz, size = dz_of(g_logp, g_kl, p, q, difference, y)
    dx = dz * slope
    dh = np.zeros((problem.labels.numel(), weight.shape[1]), np.longdouble)
    dh[by.numpy()] = dx @ weight
    result = Result(log_p[t, y], log_q[t, y], kl, dh, dx.T @ hidden, None if problem.head.bias is None else dx.sum(0))

    size_z, size_r = (np.abs(np.where(np.isfinite(x), x, 0)) for x in (z, r))
    both = np.isfinite(log_p) & np.isfinite(log_q)
    ratio = np.where(both, log_q, 0) - np.where(both, log_p, 0)
    scale = {
        "logp": size_z[t, y] + (p * size_z).sum(-1),
        "ref_logp": size_r[t, y] + (q * size_r).sum(-1),
        "bias": np.abs(dx).sum(0),
        "kl": (np.abs(difference) * size_z).sum(-1) + (q * np.abs(ratio - kl[:, None]) * size_r).sum(-1) + kl,
    }
    return Truth(result, scale, dz, size)


def _logits(hidden: Array, head: LMHead) -> tuple[Array, Array]:
    """Logits, and their derivative by ``h W^T + b``. A bias of -inf rules a token out, whatever scale and cap say."""
    x = hidden @ exact(head.weight).T
    if head.bias is not None:
        x = x + exact(head.bias)
    x = x * np.longdouble(head.logit_scale)
    slope = np.full_like(x, head.logit_scale)
    if head.softcap is not None:
        cap = np.longdouble(head.softcap)
        x, slope = cap * np.tanh(x / cap), slope / np.cosh(np.where(np.isfinite(x), x, 0) / cap) ** 2
    if head.bias is not None:
        out = np.isneginf(exact(head.bias))
        x, slope = np.where(out, -np.inf, x), np.where(out, np.longdouble(head.logit_scale), slope)
    return x, slope


def log_softmax(x: Array) -> Array:
    """The largest of each row is had from the others, so that it has digits however near to 0 it is."""
    if not x.size:
        return x
    x = x - x.max(-1, keepdims=True)
    e, t, top = np.exp(x), np.arange(len(x)), x.argmax(-1)
    e[t, top] = 0
    return x - np.log1p(e.sum(-1, keepdims=True))


def dz_of(g_logp: Array, g_kl: Array, p: Array, q: Array, difference: Array, y: Array) -> tuple[Array, Array]:
    """Return eq. (6), as whichever sum of two terms is of smaller ones, and how large they are."""
    g_logp, g_kl, t = g_logp[:, None], g_kl[:, None], np.arange(len(y))
    between, rest = g_kl - g_logp, [x.copy() for x in (p, q)]
    forms = [(-g_logp * p, -g_kl * difference), (-g_logp * q, -between * difference), (between * p, -g_kl * q)]
    dz, size = _smallest(forms)
    for x in rest:
        x[t, y] = 0
    at_label = difference[t, y][:, None]
    one_less_p, one_less_q = (x.sum(-1, keepdims=True) for x in rest)
    forms = [(g_logp * one_less_p, -g_kl * at_label), (g_logp * one_less_q, -between * at_label)]
    (dz[t, y], size[t, y]) = (x[:, 0] for x in _smallest(forms))
    return dz, size


def _smallest(forms: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    sizes = np.stack([np.abs(a) + np.abs(b) for a, b in forms])
    best = sizes.argmin(0)[None]
    return tuple(np.take_along_axis(x, best, 0)[0] for x in (np.stack([a + b for a, b in forms]), sizes))


def difference_of(log_p: Array, log_q: Array, p: Array, q: Array) -> tuple[Array, Array]:
    """q - p, and the terms of the KL, eq. (2a), neither by cancellation."""
    both = np.isfinite(log_p) & np.isfinite(log_q)
    delta = np.where(both, log_q, 0) - np.where(both, log_p, 0)
    near = both & (np.abs(delta) < 1)
    x = np.where(near, delta, 0)
    far = np.where(q > 0, p - q + q * delta, p)
    far = np.where(np.isfinite(log_q) & ~np.isfinite(log_p), np.inf, far)
    return np.where(near, p * np.expm1(x), q - p), np.where(near, q * (np.expm1(-x) + x), far)
