"""dz of equation 6 from logits and from what was staged, entry by entry, against the scalar oracle."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
import triton
import triton.language as tl
from harness import EPS, F32, F64, Row, check_all, close, every_kind, exact_rows, floats, launch, padded, row
from math_launches import exponent, load_six, staged
from torch import Tensor

from tdpo_kernels.backends.tile_math import LOWEST
from tdpo_kernels.device import math as device


@triton.jit
def _dz_from_both(z, r, values, out, R: tl.constexpr, C: tl.constexpr):
    at = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    m_z, m_r, lse_z, lse_r, lse_diff, _ = load_six(values, R)
    a, b = tl.load(values + 6 * R + tl.arange(0, R)), tl.load(values + 7 * R + tl.arange(0, R))
    tl.store(out + at, device.dz_from_both(tl.load(z + at), tl.load(r + at), m_z, m_r, lse_z, lse_r, lse_diff, a, b))


@triton.jit
def _part_weights(values, out, N: tl.constexpr):
    at = tl.arange(0, N)
    weights = device.part_weights(tl.load(values + at), tl.load(values + N + at), tl.load(values + 2 * N + at))
    tl.store(out + at, weights[0])
    tl.store(out + N + at, weights[1])
    tl.store(out + 2 * N + at, weights[2])


@triton.jit
def _dz_from_stage(p, t, values, out, R: tl.constexpr, C: tl.constexpr):
    at = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    weight, ref_weight, ratio, a, b, _ = load_six(values, R)
    tl.store(out + at, device.dz_from_stage(tl.load(p + at), tl.load(t + at), weight, ref_weight, ratio, a, b))


def part_weights(values: Tensor) -> Tensor:
    """``(3, N)`` to ``(3, N)``."""
    out = torch.full_like(values, math.nan)
    launch(_part_weights, (1,), values, out, values.shape[1])
    return out


@pytest.mark.parametrize("apart", (0.0, 1e-6, 0.3, -0.9, 1.1, -5.0, 60.0, -300.0))
def test_part_weights(apart):
    """The part's p and q within the whole; from one another by the ratio to all its digits, wherever it is given."""
    lse_r = -torch.arange(8.0)
    lse_diff = torch.full((8,), apart)
    lse_z = torch.minimum((lse_r.double() + lse_diff.double()).float(), torch.tensor(0.0))
    lse_r = (lse_z.double() - lse_diff.double()).float()
    weight, ref_weight, ratio = part_weights(torch.stack([lse_z, lse_r, lse_diff])).double()
    check_all(weight, lse_z.double().exp().tolist(), lambda i: 2 * EPS * float(weight[i]) + 1e-45)
    q = ref_weight * (-ratio).exp()
    check_all(q, lse_r.double().exp().tolist(), lambda i: EPS * float(q[i]) * (8 if abs(apart) < 1 else 2) + 1e-45)
    assert (ratio == torch.tensor(apart).double()).all() if abs(apart) < 1 else not ratio.any()


def coefficients(R: int, what: str) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, R, generator=torch.Generator().manual_seed(8))
    return {"general": (a, b), "kl": (a, 0 * b), "logp": (0 * a, b), "equal": (a, a)}[what]


def dz_from_both(z: Tensor, r: Tensor, a: Tensor, b: Tensor) -> Tensor:
    true, (R, V) = [row(z[i], r[i]) for i in range(len(z))], z.shape
    values = torch.tensor([(t.m_z, t.m_r, t.lse_z, t.lse_r, t.lse_diff, 0.0) for t in true])
    values = padded(torch.cat([values, a[:, None], b[:, None]], 1), 0.0).T.contiguous()
    z, r = padded(z, LOWEST), padded(r, LOWEST)
    out = torch.full_like(z, math.nan)
    launch(_dz_from_both, (1,), z, r, values, out, *z.shape)
    return out[:R, :V]


def dz_from_stage(z: Tensor, r: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, columns: slice) -> Tensor:
    """Of these columns, staged as a part of their own, within the whole."""
    p, t = staged(z[:, columns], r[:, columns], dtype)
    (R, _), values = p.shape, []
    for i in range(R):
        whole, part = row(z[i], r[i]), row(z[i, columns], r[i, columns])
        lse_z, lse_r = part.m_z - whole.m_z + part.lse_z - whole.lse_z, part.m_r - whole.m_r + part.lse_r - whole.lse_r
        values.append((lse_z, lse_r, lse_z - lse_r))
    weights = part_weights(padded(torch.tensor(values), 0.0)[:, :3].T.contiguous())
    weights = torch.cat([weights, *(padded(x, 0.0)[None] for x in (a, b, b))])
    p, t = padded(p, 0.0), padded(t, 0.0)
    out = torch.full_like(p, math.nan)
    launch(_dz_from_stage, (1,), p, t, weights, out, *p.shape)
    return out[:R, : columns.stop - columns.start]


def dz_bound(t: Row, z: Tensor, r: Tensor, v: int, a: float, b: float) -> float:
    """eps times what every exponential's argument amounts to, of p and, unless p and q agree, of q."""
    if t.log_p[v] == -math.inf and t.log_q[v] == -math.inf:
        return 0.0
    size = EPS * exponent(t, *(max(float(x[v]), -1e4) for x in (z, r)))
    p, q = math.exp(t.log_p[v]), math.exp(t.log_q[v])
    return size * (abs(b) * p + abs(a) * (p + q)) + (abs(a) + abs(b)) * 1e-37


def true_dz(z: Tensor, r: Tensor, a: float, b: float, label: int = -1) -> list[float]:
    return oracle.dz(floats(z), floats(r), label, -b, -a)


COEFFICIENTS = ("general", "kl", "logp", "equal")


@pytest.mark.parametrize("gap", (0.0, 104.0, -104.0, 300.0, -300.0))
@pytest.mark.parametrize("what", COEFFICIENTS)
def test_dz_from_both_is_equation_6(what, gap):
    z, r = every_kind()
    z[:, 9] += gap
    a, b = coefficients(len(z), what)
    found = dz_from_both(z, r, a, b)
    for i in range(len(z)):
        t, (x, y) = row(z[i], r[i]), (float(a[i]), float(b[i]))
        check_all(found[i], true_dz(z[i], r[i], x, y), lambda v, i=i, t=t, x=x, y=y: dz_bound(t, z[i], r[i], v, x, y))
        sizes = math.fsum(dz_bound(t, z[i], r[i], v, x, y) for v in range(24))
        assert close(found[i].double().sum(), y, 0, sizes), "with the label's, a row sums to 0"


@pytest.mark.parametrize("apart", (1e-3, 1e-2, 0.1))
@pytest.mark.parametrize("offset", (0.0, 50.0, -50.0))
def test_kl_part_of_dz_keeps_its_digits_where_the_models_nearly_agree(offset, apart):
    """To rounding of the difference itself, not of p; and it sums to 0 to rounding of itself."""
    z, r = exact_rows(apart, offset)
    a, b = coefficients(5, "kl")
    for found in (dz_from_both(z, r, a, b), dz_from_stage(z, r, a, b, F32, slice(0, 24))):
        for i in range(5):
            t = row(z[i], r[i])
            size = max(abs(float(z[i, v] - r[i, v]) - (t.m_z - t.m_r)) for v in range(24)) * abs(float(a[i])) * EPS
            want = true_dz(z[i], r[i], float(a[i]), 0.0)
            check_all(
                found[i], want,
                lambda v, t=t, s=size, w=want: 8 * s * math.exp(t.log_p[v]) + EPS * abs(w[v]) * (8 + abs(t.log_p[v])),
            )  # fmt: skip
            assert close(found[i].double().sum(), 0, 0, 16 * size)


def test_equal_models_have_no_kl_gradient():
    z, r = exact_rows(0.0, 50.0)
    a, b = coefficients(5, "kl")
    assert not dz_from_both(z, r, a, b).count_nonzero()
    assert not dz_from_stage(z, r, a, b, torch.bfloat16, slice(0, 24)).count_nonzero()


@pytest.mark.parametrize("gap", (0.0, 104.0, -104.0, 300.0, -300.0))
@pytest.mark.parametrize("columns", (slice(0, 24), slice(8, 16)), ids=("whole", "part"))
def test_dz_from_stage_is_equation_6(columns, gap):
    """In fp32; a log-ratio of g nats is off by eps g."""
    z, r = every_kind()
    z[:, 9] += gap
    a, b = coefficients(len(z), "general")
    found = dz_from_stage(z, r, a, b, F32, columns)
    for i in range(len(z)):
        t, (x, y) = row(z[i], r[i]), (float(a[i]), float(b[i]))
        part = row(z[i, columns], r[i, columns])
        extra = 8 * EPS * (abs(gap) + part.diff_scale + abs(part.m_z - part.m_r) + abs(t.lse_diff) + 16)
        want = true_dz(z[i], r[i], x, y)[columns]

        def bound(v, t=t, i=i, x=x, y=y, extra=extra):
            v += columns.start
            log_p, log_q = t.log_p[v], t.log_q[v]
            grows = math.exp(log_p) * abs(y) + (math.exp(log_p) + math.exp(log_q)) * abs(x)
            return dz_bound(t, z[i], r[i], v, x, y) + extra * grows + 1e-30

        check_all(found[i], want, bound)


@pytest.mark.parametrize("apart", (1e-3, 1e-2, 0.1))
@pytest.mark.parametrize("offset", (0.0, 50.0))
def test_kl_part_of_dz_from_bf16_stays_within_three_per_mille(offset, apart):
    """2^-9 is what rounding t to bf16 costs an entry."""
    z, r = exact_rows(apart, offset, V=96)
    a, b = coefficients(5, "kl")
    found = dz_from_stage(z, r, a, b, torch.bfloat16, slice(0, 96)).double()
    want = torch.tensor([true_dz(z[i], r[i], float(a[i]), 0.0) for i in range(5)], dtype=F64)
    assert ((found - want).norm(dim=1) <= 3e-3 * want.norm(dim=1)).all()
