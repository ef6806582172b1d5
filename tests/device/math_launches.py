"""Functions of `device/math.py` on rows: each in a kernel of loads, one call, and stores."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from harness import F32, Row, launch, padded, poisoned
from torch import Tensor

from tdpo_kernels.backends import tile_math
from tdpo_kernels.backends.tile_math import LOWEST
from tdpo_kernels.device import math as device

NEAR, LARGE = (float(torch.tensor(x.value, dtype=F32)) for x in (device.NEAR, device.LARGE))
F = tile_math.largest_exponent(F32)


# --- states -----------------------------------------------------------------------------------------------------------


@triton.jit
def load_six(x, N: tl.constexpr):
    at = tl.arange(0, N)
    return (
        tl.load(x + at), tl.load(x + N + at), tl.load(x + 2 * N + at), tl.load(x + 3 * N + at), tl.load(x + 4 * N + at),
        tl.load(x + 5 * N + at),
    )  # fmt: skip


@triton.jit
def store_six(x, a, b, c, d, e, f, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(x + at, a)
    tl.store(x + N + at, b)
    tl.store(x + 2 * N + at, c)
    tl.store(x + 3 * N + at, d)
    tl.store(x + 4 * N + at, e)
    tl.store(x + 5 * N + at, f)


@triton.jit
def _tile_state(z, r, out, R: tl.constexpr, C: tl.constexpr):
    at = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    z, r = tl.load(z + at), tl.load(r + at)
    m_z, m_r = tl.max(z, 1), tl.max(r, 1)
    z, r, left_z, left_r = device.anchored(z, r, m_z, m_r)
    s_z, s_r, mean, M = device.tile_state(z, r, left_z, left_r)
    store_six(out, m_z, s_z, m_r, s_r, mean, M, R)


@triton.jit
def _empty(out, N: tl.constexpr):
    m_z, s_z, m_r, s_r, mean, M = device.empty_state(tl.arange(0, N).to(tl.float32))
    store_six(out, m_z, s_z, m_r, s_r, mean, M, N)


@triton.jit
def _merge(one, other, out, N: tl.constexpr):
    m_z, s_z, m_r, s_r, mean, M = load_six(one, N)
    n_z, t_z, n_r, t_r, other_mean, O = load_six(other, N)  # noqa: E741
    m_z, s_z, m_r, s_r, mean, M = device.merge(m_z, s_z, m_r, s_r, mean, M, n_z, t_z, n_r, t_r, other_mean, O)
    store_six(out, m_z, s_z, m_r, s_r, mean, M, N)


@triton.jit
def _finish(state, out, N: tl.constexpr):
    m_z, s_z, m_r, s_r, mean, M = load_six(state, N)
    lse_z, lse_r, phi = device.finish(s_z, s_r, M)
    kl, lse_diff = device.kl_of(lse_z, lse_r, mean, phi), device.lse_diff_of(lse_z, lse_r, mean, phi)
    store_six(out, m_z, m_r, lse_z, lse_r, kl, lse_diff, N)


class Finished(NamedTuple):
    m_z: Tensor
    m_r: Tensor
    lse_z: Tensor
    lse_r: Tensor
    kl: Tensor
    lse_diff: Tensor


def tile_state(z: Tensor, r: Tensor) -> Tensor:
    """``(6, R)``, R a power of 2. Columns past the last are ruled out, as a kernel does it."""
    z, r = padded(z, LOWEST), padded(r, LOWEST)
    out = poisoned(6, len(z))
    launch(_tile_state, (1,), z, r, out, *z.shape)
    return out


def empty(N: int) -> Tensor:
    out = poisoned(6, N)
    launch(_empty, (1,), out, N)
    return out


def merge(one: Tensor, other: Tensor) -> Tensor:
    out = torch.full_like(one, math.nan)
    launch(_merge, (1,), one, other, out, one.shape[1])
    return out


def finish(state: Tensor) -> Finished:
    out = torch.full_like(state, math.nan)
    launch(_finish, (1,), state, out, state.shape[1])
    return Finished(*out)


# --- what is staged ---------------------------------------------------------------------------------------------------


@triton.jit
def _log_ratio(z, r, m_z, m_r, lse_diff, out, F, R: tl.constexpr, C: tl.constexpr):
    at, row = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :], tl.arange(0, R)
    m_z, m_r, lse_diff = tl.load(m_z + row), tl.load(m_r + row), tl.load(lse_diff + row)
    z, r, m_z, m_r = device.anchored(tl.load(z + at), tl.load(r + at), m_z, m_r)
    tl.store(out + at, device.log_ratio(z, r, m_z, m_r, lse_diff, F))


@triton.jit
def _weigh(p, q, t, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, device.weigh(tl.load(p + at), tl.load(q + at), tl.load(t + at)))


@triton.jit
def _softmax(x, m, lse, out, R: tl.constexpr, C: tl.constexpr):
    at = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    rows = tl.arange(0, R)
    tl.store(out + at, device.softmax(tl.load(x + at), tl.load(m + rows), tl.load(lse + rows)))


def softmax(x: Tensor, m: Tensor, lse: Tensor) -> Tensor:
    out = torch.full_like(x, math.nan)
    launch(_softmax, (1,), x, m, lse, out, *x.shape)
    return out


def weigh(p: Tensor, q: Tensor, t: Tensor) -> Tensor:
    p, q, t = (padded(x.flatten(), 0.0) for x in (p, q, t))
    out = torch.full_like(p, math.nan)
    launch(_weigh, (1,), p, q, t, out, len(p))
    return out


def staged(z: Tensor, r: Tensor, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    """p and t as `stats.stage` stages them; t rounded to `dtype`."""
    done, (R, V) = finish(tile_state(z, r)), z.shape
    z, r = padded(z, LOWEST), padded(r, LOWEST)
    t = torch.full_like(z, math.nan)
    rows = (x.contiguous() for x in (done.m_z, done.m_r, done.lse_diff))
    launch(_log_ratio, (1,), z, r, *rows, t, F, *z.shape)
    t = t.to(dtype).float()
    p, q = (
        softmax(x, m.contiguous(), lse.contiguous())
        for x, m, lse in ((z, done.m_z, done.lse_z), (r, done.m_r, done.lse_r))
    )
    return weigh(p, q, t)[: p.numel()].view_as(p)[:R, :V], t[:R, :V]


def exponent(t: Row, z: float, r: float) -> float:
    """How many eps exp(log p) and exp(log q) may be off: the size of what they are exponentials of."""
    return 4 + abs(z - t.m_z) + abs(r - t.m_r) + t.lse_z + t.lse_r
