"""Whole calls on backends that launch kernels: what a user's tensors may look like, and what must not come of it."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import Problem, base, bias_of, cotangents
from closeness import Result, leaves, ours, pull, stats_of
from harness import F16, F32
from runnable import mainly
from torch import Tensor

from tdpo_kernels.backends import launch, slab
from tdpo_kernels.tuning import TileConfig

EVERYTHING = 2**40
KERNELS = ("fused", "tiled")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "choose", lambda *_, **__: TileConfig(16, 64, 32))
    monkeypatch.setitem(slab.TILE, "cpu", (32, 64))
    with np.errstate(over="ignore", invalid="ignore"):
        yield


def spread_out(x: Tensor) -> Tensor:
    """The same numbers, neighbours two elements apart, rows among NaN."""
    out = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    out[..., ::2] = x
    return out[..., ::2]


def transposed(x: Tensor) -> Tensor:
    return x.T.contiguous().T if x.dim() == 2 else spread_out(x)


@pytest.mark.parametrize("change", (spread_out, transposed))
@pytest.mark.parametrize("budget", mainly((EVERYTHING,), (0, EVERYTHING)))
@pytest.mark.parametrize("backend", KERNELS)
def test_strides_change_nothing(backend: str, budget: int, change):
    case = base(4)
    p = replace(case, bias=bias_of(case, 1), ref_bias=bias_of(case, 2)).problem(F32)
    heads = [replace(h, weight=change(h.weight), bias=spread_out(h.bias)) for h in (p.head, p.ref_head)]
    odd = replace(p, hidden=change(p.hidden), ref_hidden=change(p.ref_hidden), head=heads[0], ref_head=heads[1])
    g = cotangents("general", p.labels)
    (want, _), (found, _) = (ours(x, g, backend, budget) for x in (p, odd))
    for name in Result.NAMES:
        a, b = getattr(want, name).astype(float), getattr(found, name).astype(float)
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max(), name


@pytest.mark.parametrize("budget", (0, EVERYTHING))
def test_persistent_programs_leave_the_same_bits(budget: int, monkeypatch: pytest.MonkeyPatch):
    """One of them makes every tile of a launch, as the interpreter holds one at a time."""
    p = base(4).problem(F32)
    g = cotangents("general", p.labels)
    want, _ = ours(p, g, "fused", budget)
    grids = []
    programs = launch._programs
    monkeypatch.setattr(launch, "_programs", lambda *x: grids.append(programs(*x)) or grids[-1])
    monkeypatch.setattr(launch, "choose", lambda *_, **__: TileConfig(16, 64, 32, warps=8, persistent=True))
    found, _ = ours(p, g, "fused", budget)
    assert set(grids) == {(1,)}
    for name in Result.NAMES:
        assert np.array_equal(getattr(want, name), getattr(found, name)), name


@pytest.mark.parametrize("wide", (False, True), ids=("cut", "the same"))
def test_heads_at_one_address_are_one_head_only_if_they_are_the_same(wide: bool):
    """A reference of fewer hidden features may have a part of the policy's weight."""
    p = base(6).problem(F32)
    E = p.hidden.shape[-1] - (0 if wide else 7)
    ref_head, ref_hidden = replace(p.ref_head, weight=p.head.weight[:, :E]), p.ref_hidden[..., :E]
    assert ref_head.weight.data_ptr() == p.head.weight.data_ptr()
    shared = replace(p, ref_head=ref_head, ref_hidden=ref_hidden)
    apart = replace(shared, ref_head=replace(ref_head, weight=ref_head.weight.clone()))
    want, found = (stats_of(x, "fused", 0) for x in (apart, shared))
    for name in ("logp", "ref_logp", "kl"):
        a, b = getattr(want, name), getattr(found, name)
        assert (a - b).abs().max() <= 1e-5 * a.abs().max(), name


@pytest.mark.parametrize("budget", mainly((0,), (0, EVERYTHING)))
@pytest.mark.parametrize("backend", KERNELS)
def test_rows_of_no_cotangent_have_no_gradient_however_low_their_logits(backend: str, budget: int):
    """A program's rows, not the walk's: 0 x e^-L is 0 x inf."""
    case = base(5, L=60, ignored=0.0)
    case.hidden[..., 0], case.weight[:, 0] = 1.0, -200.0
    p = case.problem(F32)
    g = torch.randn(2, *p.labels.shape, generator=torch.Generator().manual_seed(0))
    g[:, :, 10:35] = 0
    p, parts = leaves(p)
    out = stats_of(p, backend, budget)
    grads = pull((out.logp, out.kl), (g[0], g[1]), parts)
    assert all(x.isfinite().all() for x in grads)
    assert not grads[0][:, 9:34].count_nonzero()


@pytest.mark.parametrize("backend", KERNELS)
def test_what_backward_would_cut_otherwise_is_cut_as_forward_did(backend: str, monkeypatch: pytest.MonkeyPatch):
    """Settings and addresses may have changed since: saved tensors that were moved, another precision."""
    p: Problem = base(6).problem(F16)
    g = cotangents("general", p.labels)
    results = []
    for other in (False, True):
        live, parts = leaves(p)
        out = stats_of(live, backend, EVERYTHING)
        if other:
            monkeypatch.setattr(launch, "choose", lambda *_, **__: TileConfig(16, 32, 32))
            monkeypatch.setitem(slab.TILE, "cpu", (16, 128))
        results.append(pull((out.logp, out.kl), tuple(x.to(F32) for x in g), parts))
    for a, b in zip(*results, strict=True):
        assert (a.double() - b.double()).norm() <= 2e-3 * a.double().norm()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("where", ("hidden", "ref_hidden"))
def test_nan_comes_out_as_nan(backend: str, where: str):
    case = base(7)
    p = replace(case, bias=bias_of(case), options=dict(softcap=5.0)).problem(F32)
    getattr(p, where)[1, 5] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the self-check says that it is put off
        out = stats_of(p, backend, 0)
    logp = out.logp if where == "hidden" else out.ref_logp
    assert logp[1, 6].isnan() and out.kl[1, 6].isnan() and logp[0].isfinite().all()
