"""Functions of `device/math.py` by themselves, against numpy's longdouble."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from harness import F32, F64, launch, poisoned
from torch import Tensor
from truth import exact

from tdpo_kernels.backends import rowmath as host
from tdpo_kernels.device import math as device

EPS = torch.finfo(F32).eps
NEAR = float(torch.tensor(device.NEAR.value, dtype=F32))


@triton.jit
def _each(function: tl.constexpr, x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, function(tl.load(x + at)))


@triton.jit
def _slope(x, softcap, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, device.softcap_slope(tl.load(x + at), softcap))


@triton.jit
def _difference(z, r, top_z, top_r, out, R: tl.constexpr, C: tl.constexpr):
    at = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    tops = tl.load(top_z + tl.arange(0, R)), tl.load(top_r + tl.arange(0, R))
    tl.store(out + at, device.exact_difference(tl.load(z + at), tl.load(r + at), tops[0], tops[1]))


def each(function, x: Tensor) -> Tensor:
    out = poisoned(len(x), dtype=x.dtype)
    launch(_each, (1,), function, x, out, len(x))
    return out


def both_signs(low: float, high: float) -> Tensor:
    """Even in size, with the edge of the series to the last bit, 512 of them."""
    near = torch.tensor(NEAR)
    edges = [torch.nextafter(near, near + s) for s in (1, -1)]
    x = torch.cat([torch.logspace(math.log10(low), math.log10(high), 252), torch.stack([near, *edges]), torch.zeros(1)])
    return torch.cat([x, -x])


@pytest.mark.parametrize(
    ("function", "want", "high", "eps"),
    (
        (device.psi_series, lambda y: np.expm1(y) - y, 0.3499, 2),
        (device.expm1, np.expm1, 60.0, 2),
        (device.tanh, np.tanh, 60.0, 4),
    ),
    ids=("psi", "expm1", "tanh"),
)
def test_functions_of_one_number(function, want, high, eps):
    """To a few eps of themselves, and to what an exponential's argument is rounded by."""
    x = both_signs(1e-4, high)
    x = torch.where(x.abs() < high, x, high / 2)
    true, found = want(exact(x)), exact(each(function, x))
    assert (np.abs(found - true) <= EPS * (eps + np.abs(exact(x)) * (high > 1)) * np.abs(true)).all()


def test_a_series_has_all_its_terms():
    """Compute in float64, so that the only error left is the series' end."""
    x = torch.linspace(-NEAR, NEAR, 64, dtype=F64)
    true = np.expm1(exact(x)) - exact(x)
    assert (np.abs(exact(each(device.psi_series, x)) - true) <= 1e-8 * true).all()


@pytest.mark.parametrize("softcap", (1.0, 30.0))
def test_slope_has_all_digits_where_the_softcap_is_saturated(softcap):
    x = softcap * both_signs(1e-3, 40.0)
    out = poisoned(len(x))
    launch(_slope, (1,), x, softcap, out, len(x))
    u = np.abs(exact(x) / softcap)
    want = 4 * np.exp(-2 * u) / (1 + np.exp(-2 * u)) ** 2
    assert (np.abs(exact(out) - want) <= EPS * (6 + 4 * u) * want).all()
    assert out.min() > 0


@pytest.mark.parametrize("offset", (0.0, 1.0, -7.0, 1000.0, -1e4, 1e30))
def test_exact_difference_has_all_its_digits(offset):
    """Whatever the offset between the models, and whoever of them is ruled out."""
    g = torch.Generator().manual_seed(0)
    z, noise = 5 * torch.randn(4, 32, generator=g), torch.randn(4, 32, generator=g)
    r = z + 1e-3 * noise - offset
    z[1, :4], r[1, :4], z[2, 3], r[3, 5] = (host.LOWEST,) * 4
    top_z, top_r = z.amax(1), r.amax(1)
    out = poisoned(4, 32)
    launch(_difference, (1,), z, r, top_z, top_r, out, 4, 32)
    want = (exact(z) - exact(top_z)[:, None]) - (exact(r) - exact(top_r)[:, None])
    inside = (np.abs(exact(z) - exact(top_z)[:, None]) < 1e20) & (np.abs(exact(r) - exact(top_r)[:, None]) < 1e20)
    assert inside.sum() >= 4 * 32 - 6 and out.isfinite().all()
    assert (np.abs(exact(out) - want) <= EPS * np.abs(want))[inside].all()


def test_constants_are_those_of_the_host():
    assert (device.LOWEST.value, device.RULED_OUT.value) == (-1e30, -1e29)
    assert (device.NEAR.value, device.FAR.value) == (host.NEAR, host.FAR)
    assert (host.LOWEST, host.STATE, host.ROW) == (-1e30, 6, 9)
