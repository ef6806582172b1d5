"""Functions of one number in `device/math.py`, and the head, against the scalar oracle."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
import triton
import triton.language as tl
from harness import EPS, F32, F64, check_all, launch, padded, poisoned, power_of_2
from math_launches import LARGE, NEAR
from torch import Tensor

from tdpo_kernels.backends import tile_math
from tdpo_kernels.backends.tile_math import LOWEST
from tdpo_kernels.device import math as device


def test_device_and_host_mean_the_same_by_their_constants():
    assert float(device.LOWEST.value) == LOWEST
    assert (device.ROUNDING.value, device.NEAR_TOPS.value) == (tile_math.ROUNDING, tile_math.NEAR)
    assert math.log(LARGE) < float(device.TOP_EXPONENT.value) < math.log(torch.finfo(F32).max)


# --- functions of one number ------------------------------------------------------------------------------------------


@triton.jit
def _each(function: tl.constexpr, x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, function(tl.load(x + at)))


def each(function, x: Tensor) -> Tensor:
    x = padded(x, 0.0)
    out = poisoned(len(x))
    launch(_each, (1,), function, x, out, len(x))
    return out


def spread(low: float, high: float) -> Tensor:
    """Both signs, evenly in size, and the edges of the series to the last bit."""
    sizes = torch.logspace(math.log10(low), math.log10(high), 200, dtype=F64).float()
    near = torch.tensor(NEAR)
    edges = torch.stack([near, *(torch.nextafter(near, near + s) for s in (1, -1))])
    sizes = torch.cat([sizes, edges, torch.zeros(1)])
    return torch.cat([sizes, -sizes])


def exact_psi(y: float) -> float:
    return oracle.phi(-y)


def check_each(function, x: Tensor, want, bound) -> None:
    values = x.double().tolist()
    true = [want(v) for v in values]
    check_all(each(function, x)[: len(x)], true, lambda i: bound(values[i], true[i]))


def test_psi_series():
    x = spread(1e-6, NEAR)
    check_each(device.psi_series, x[x.abs() <= NEAR], exact_psi, lambda y, want: 4 * EPS * want)


def in_float64(function, x: Tensor) -> Tensor:
    """As if it were rounded nowhere: what is left is where a series ends."""
    out = poisoned(power_of_2(len(x)), dtype=F64)
    launch(_each, (1,), function, padded(x.double(), 0.0), out, len(out))
    return out[: len(x)]


def test_a_series_has_all_its_terms():
    x = torch.linspace(-NEAR, NEAR, 101, dtype=F64)
    for function, want, off in (
        (device.psi_series, exact_psi, 4e-9),
        (device.expm1, math.expm1, 4e-9),
        (device.log1p, math.log1p, 2e-9),
    ):
        true = [want(v) for v in x.tolist()]
        check_all(in_float64(function, x), true, lambda i, true=true, off=off: off * abs(true[i]))
    ends = torch.tensor([-0.4999, -0.45, 0.5, 0.999], dtype=F64)
    check_all(in_float64(device.log1p, ends), [math.log1p(v) for v in ends.tolist()], lambda i: 2e-9)


def test_psi():
    """To a few eps of itself by the series, of its terms beyond; never negative."""
    x = spread(1e-6, 80.0)
    check_each(
        device.psi, x, exact_psi, lambda y, w: 4 * EPS * w if abs(y) < NEAR else EPS * (math.exp(y) + abs(1 + y))
    )
    assert (each(device.psi, x) >= 0).all()


def test_expm1():
    check_each(
        device.expm1, spread(1e-6, 80.0), math.expm1,
        lambda x, w: 2 * EPS * abs(w) if abs(x) < NEAR else EPS * (math.exp(x) + 1),
    )  # fmt: skip


def test_log1p():
    x = torch.cat([spread(1e-9, 1e12).abs(), torch.tensor([1.0]), torch.nextafter(torch.ones(1), torch.zeros(1))])
    check_each(device.log1p, x, math.log1p, lambda x, w: 3 * EPS * w)
    below = torch.cat(
        [-spread(1e-9, 0.99).abs(), torch.tensor([-0.5]), torch.nextafter(-torch.ones(1) / 2, torch.zeros(1))]
    )
    check_each(device.log1p, below, math.log1p, lambda x, w: 4 * EPS * abs(w) + EPS * (x < -0.4))


def test_tanh():
    check_each(device.tanh, spread(1e-6, 80.0), math.tanh, lambda x, w: 4 * EPS * abs(w))


@triton.jit
def _slope(x, out, softcap, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, device.softcap_slope(tl.load(x + at), softcap))


@pytest.mark.parametrize("softcap", (2.0, 30.0))
def test_softcap_slope(softcap):
    x = torch.linspace(-4 * softcap, 4 * softcap, 64, dtype=F64)
    z, out = (softcap * (x / softcap).tanh()).float(), poisoned(64)
    launch(_slope, (1,), z, out, softcap, 64)
    check_all(out, (1 - (z.double() / softcap) ** 2).tolist(), lambda i: 2 * EPS)
    check_all(out, [1 / math.cosh(v / softcap) ** 2 for v in x.tolist()], lambda i: 4 * EPS)


# --- the head ---------------------------------------------------------------------------------------------------------


@triton.jit
def _head(
    x, bias, out, scale, softcap,
    R: tl.constexpr, C: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    bias_C = tl.load(bias + tl.arange(0, C))
    tl.store(out + at, device.head(tl.load(x + at), bias_C, scale, softcap, HAS_BIAS, HAS_SOFTCAP))


def head(x: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    out, bias_C = poisoned(*x.shape), torch.full(x.shape[1:], 1e9) if bias is None else bias
    cap = 1e-9 if softcap is None else softcap
    launch(
        _head, (1,), x, bias_C, out, scale, cap, *x.shape, HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None
    )
    return out


@pytest.mark.parametrize("softcap", (None, 2.0, 30.0))
@pytest.mark.parametrize("scale", (1.0, 0.3, 7.0))
@pytest.mark.parametrize("biased", (False, True))
def test_head(biased, scale, softcap):
    g = torch.Generator().manual_seed(1)
    x, bias = 4 * torch.randn(4, 32, generator=g), torch.randn(32, generator=g) if biased else None
    found = head(x, bias, scale, softcap)
    for i in range(len(x)):
        biases = bias.tolist() if biased else None
        want = oracle.logits([1.0], [[v] for v in x[i].tolist()], biases, torch.tensor(scale).item(), softcap)
        size = [scale * (abs(v) + (abs(float(bias[j])) if biased else 0)) for j, v in enumerate(x[i].tolist())]
        check_all(found[i], want, lambda j, size=size, want=want: 2 * EPS * size[j] + 4 * EPS * abs(want[j]))


@pytest.mark.parametrize("softcap", (None, 30.0))
@pytest.mark.parametrize("scale", (1.0, 0.3, 7.0))
def test_head_turns_what_a_bias_rules_out_into_lowest(scale, softcap):
    """And with a softcap into its negative, as the definition says."""
    bias = torch.zeros(16)
    bias[3] = -math.inf
    found = head(torch.randn(2, 16), bias, scale, softcap)
    assert torch.equal(found[:, 3], torch.full((2,), LOWEST if softcap is None else -softcap, dtype=F32))
    assert (found.abs() < 100).sum() == found.numel() - (2 if softcap is None else 0)
