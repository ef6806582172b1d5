"""Law 2: what is exact in mathematics keeps its digits. Rows of logits are given to the bit (`cases.of_logits`), so
that no product's rounding hides the row mathematics, and dz is read off the weight's gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import DTYPES, Case, base, cotangents, of_logits
from closeness import SIXTEEN_BIT, dtype_id, leaves, pull, same_bits, stats_of
from hypothesis import given
from hypothesis import strategies as st
from runnable import mainly
from test_equality import loss_of
from torch import Tensor
from truth import Array, Truth, exact, round_cotangents, truth

from tdpo_kernels import TokenStats

T, V = 16, 1025
WIDE = [torch.float64, torch.float32]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(
    std: float = 1.0, apart: float = 0.3, offset: float = 0.0, sure: tuple[float, float] = (0.0, 0.0), V: int = V,
    another: float | tuple[float, float] = 0.0, seed: int = 0,
) -> Case:  # fmt: skip
    """T rows of logits. The reference is `apart` and `offset` away; `sure`: how far the label is put up, in the policy
    and in the reference; `another`: how far another token in the policy, or in both."""
    z, noise = std * normal(T, V, seed=seed), apart * normal(T, V, seed=seed + 1)
    r = z + noise + offset
    labels = torch.randint(V, (T,), generator=torch.Generator().manual_seed(seed))
    labels[:2] = V - 1
    every = torch.arange(T)
    z[every, labels] += sure[0]
    r[every, labels] += sure[1]
    for logits, up in zip((z, r), another if isinstance(another, tuple) else (another, 0.0), strict=True):
        logits[every, (labels + V // 2) % V] += up
    return of_logits(z, r, labels, tile=(16, 256))


def half_down() -> Case:
    """The policy has half of the vocabulary 300 nats down: a KL of 150."""
    case = rows()
    weight = case.weight.clone()
    weight[::2] -= 300.0
    return replace(case, weight=weight)


ROWS: dict[str, Callable[[], Case]] = {
    "plain": rows,
    "peaked": lambda: rows(std=10.0),
    "peaked, nearly equal": lambda: rows(std=10.0, apart=1e-3),
    **{f"nearly equal, {k} apart": (lambda k=k: rows(apart=1e-4, offset=k)) for k in (0.0, 2.0, 3.0, 5.0, 7.0, 362.0)},
    "nearly equal by 1e-3, 50 apart": lambda: rows(apart=1e-3, offset=-50.0),
    "nearly equal by 1e-2, 50 apart": lambda: rows(apart=1e-2, offset=50.0),
    "1e4 apart": lambda: rows(offset=1e4),
    **{f"sure by {n}": (lambda n=n: rows(sure=(n, n))) for n in (15.0, 20.0, 23.0, 30.0, 80.0)},
    "policy sure by 30": lambda: rows(sure=(30.0, 0.0)),
    "reference sure by 30": lambda: rows(sure=(0.0, 30.0)),
    "policy sure of another": lambda: rows(sure=(0.0, 25.0), another=25.0, V=268),
    **{f"policy sure of another by {n}": (lambda n=n: rows(sure=(0.0, n), another=n)) for n in (10.0, 79.0, 81.0)},
    "both sure of another, 1e3 apart": lambda: rows(another=(30.0, 30.3), offset=1e3),
    "half of it 300 down": half_down,
}
MAIN = ("general", "kl_zero", "apart_1e-7")
KINDS = (*MAIN, "equal", "logp_zero", "apart_1e-6", "apart_1e-4")
EVERY_KIND = pytest.mark.parametrize("kinds", mainly((MAIN,), (MAIN, KINDS[3:])), ids=("main", "other"))


@functools.cache
def case_of(name: str) -> Case:
    return ROWS[name]()


@functools.cache
def truth_of(name: str, dtype: torch.dtype, kind: str) -> Truth:
    return truth(case_of(name).problem(dtype), cotangents(kind, case_of(name).labels))


def of_rows(case: Case, dtype: torch.dtype, cotangent: str, backend: str, budget: int = 0) -> tuple[TokenStats, Array]:
    """Return the statistics and dz, entry by entry."""
    live, parts = leaves(case.problem(dtype))
    out = stats_of(live, backend, budget)
    grads = pull((out.logp, out.kl), round_cotangents(live, cotangents(cotangent, live.labels)), parts)
    return out, exact(grads[1]).T


def excess(out: TokenStats, dz: Array, true: Truth, sure: bool) -> dict[str, float]:
    """Return how many times too large each error is."""
    eps = torch.finfo(out.kl.dtype).eps
    have = {name: exact(getattr(out, name).flatten()) for name in ("logp", "ref_logp", "kl")}
    found = {name: (np.abs(x - getattr(true.result, name)), getattr(true.result, name)) for name, x in have.items()}
    errors = {
        name: (error / np.maximum(np.abs(want), 1e-37)).max() / (1000 * eps) for name, (error, want) in found.items()
    }
    size, every = true.size.max(-1), true.size.sum(-1)
    errors["dz"] = (np.abs(dz - true.dz).max(-1) / size).max() / (200 * eps)
    errors["sum of dz"] = (np.abs(dz.sum(-1)) / every).max() / ((100 if sure else 10) * eps)
    return {name: float(x) for name, x in errors.items() if not x <= 1}


@EVERY_KIND
@pytest.mark.parametrize("dtype", WIDE, ids=dtype_id)
@pytest.mark.parametrize(
    "name", mainly(("nearly equal, 5.0 apart", "sure by 23.0", "policy sure of another by 81.0"), ROWS)
)
def test_every_number_of_a_row_has_its_digits(name: str, dtype: torch.dtype, kinds: tuple, backend: str, small_tiles):
    """Log-probabilities and KL relative to themselves, entries of dz to the row's largest; a row of dz sums to 0.

    The KL is of 5e-9 nats, from where every run starts, to 150, where none should go.
    """
    case, faults = case_of(name), {}
    small_tiles(*case.tile)
    for kind in kinds:
        out, dz = of_rows(case, dtype, kind, backend)
        if found := excess(out, dz, truth_of(name, dtype, kind), "sure" in name):
            faults[kind] = found
    assert not faults, f"so many times too large: {faults}"


@given(
    seed=st.integers(0, 10**6), V=st.sampled_from([1, 2, 3, 17, 64, 65, 131]), std=st.sampled_from([0.1, 1.0, 10.0]),
    apart=st.sampled_from([0.0, 1e-7, 1e-5, 1e-3, 0.1, 1.0]), offset=st.sampled_from([0.0, 3.0, 50.0, -1000.0]),
    sure=st.sampled_from([(0.0, 0.0), (9.0, 9.0), (20.0, 20.0), (40.0, 0.0), (0.0, 40.0)]), kind=st.sampled_from(KINDS),
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_random_rows(seed, V, std, apart, offset, sure, kind, dtype, backend, small_tiles):
    """Allow for small vocabularies, where a sum is less than what it is a sum of. 16 bits do not hold such a dz."""
    case = rows(std, apart, offset, sure, V, seed=seed)
    if dtype in SIXTEEN_BIT:
        assert (stats_of(case.problem(dtype), backend, 0).kl >= 0).all()
        return
    out, dz = of_rows(case, dtype, kind, backend)
    true = truth(case.problem(dtype), cotangents(kind, case.labels))
    eps, floor = torch.finfo(dtype).eps, 1e-18 if dtype == torch.float64 else 1e-37  # the truth's own, the smallest
    assert (out.kl >= 0).all()  # False for nan
    assert (np.abs(dz - true.dz) <= 100 * eps * true.size.max(-1, keepdims=True) + floor).all()
    assert (np.abs(dz.sum(-1)) <= 100 * eps * true.size.sum(-1) + floor).all()
    kl = true.result.kl
    assert (np.abs(exact(out.kl[0]) - kl) <= 1e-3 * kl + 1e-30)[kl > 1e-8].all()


# --- rows of dz in 16 bits, DPO ---------------------------------------------------------------------------------------

SUMMED = ("plain", "nearly equal, 5.0 apart", "sure by 15.0", "sure by 30.0", "policy sure of another")


@EVERY_KIND
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=dtype_id)
@pytest.mark.parametrize("name", mainly(("plain",), SUMMED))
def test_rows_of_16_bit_dz_sum_to_zero(name, dtype, kinds, backend, small_tiles):
    """Rows sum to 0 as nearly as entries that are rounded each on its own; what is kept leaves no trace."""
    case = case_of(name)
    small_tiles(*case.tile)
    for kind in kinds:
        true = truth_of(name, dtype, kind).dz
        tiny = torch.finfo(dtype).tiny * torch.finfo(dtype).eps * V  # of the gradient itself, which nobody can scale
        for budget in (0, 2**40):
            total = np.abs(of_rows(case, dtype, kind, backend, budget)[1].sum(-1))
            assert (total <= 2 * torch.finfo(dtype).eps * np.sqrt((true * true).sum(-1)) + tiny).all(), kind


@pytest.mark.parametrize("dtype", mainly((torch.bfloat16,), DTYPES), ids=dtype_id)
def test_alpha_zero_is_dpo(dtype, backend, small_tiles):
    """Value and gradients, against DPO written out on the logp of the same backend."""
    results = []
    for dpo in (False, True):
        problem, parts = leaves(base(46, B=4).problem(dtype))
        if dpo:
            out = stats_of(problem, backend, 0)
            (m_w, m_l) = (out.logp.double().sum(-1) - out.ref_logp.double().sum(-1)).chunk(2)
            loss = -torch.nn.functional.logsigmoid(0.3 * (m_w - m_l)).mean().to(out.logp.dtype)
        else:
            loss = loss_of(problem, backend, beta=0.3, alpha=0.0, memory_budget=0).loss
        results.append([loss, *torch.autograd.grad(loss, parts)])
    assert same_bits(results[0][:1], results[1][:1])
    for a, b in zip(*results, strict=True):
        eps = torch.finfo(a.dtype).eps
        assert (a.double() - b.double()).norm() <= 4 * eps * b.double().norm()
