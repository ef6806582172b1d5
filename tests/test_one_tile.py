"""Which calls run straight through (`backends/one_tile.py`), and what the laws of `test_laws.py` do not say of them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import Case, Problem, base, bias_of, cotangents, every_label, surer_than
from closeness import judge, leaves, ours, pull, round_cotangents, stats_of, truth
from runnable import interpreting
from torch import Tensor

from tdpo_kernels import LMHead
from tdpo_kernels.backends import one_tile, slab
from tdpo_kernels.registered import room
from tdpo_kernels.types import Inputs, Model, Needs, Rows

pytestmark = pytest.mark.skipif(interpreting(), reason="kernels have no way of their own for one tile")
T, V, D = 16, 64, 8
EVERYTHING = 2**40
ALL = Needs(True, True, True)


@pytest.fixture(autouse=True)
def tile(monkeypatch: pytest.MonkeyPatch):
    """Just large enough for T rows of V logits and D hidden features."""
    monkeypatch.setitem(slab.TILE, "cpu", (T, V + D))


def inputs(
    rows: int = T,
    vocab: int = V,
    dtype: torch.dtype = torch.float32,
    width: int = D,
    ref_width: int = D,
    **options: object,
) -> Inputs:
    policy, reference = (Model(torch.zeros(rows, d), LMHead(torch.zeros(vocab, d)), dtype) for d in (width, ref_width))
    policy, reference = (
        replace(x, hidden=x.hidden.to(dtype), head=LMHead(x.head.weight.to(dtype))) for x in (policy, reference)
    )
    rows_T = Rows(None, None, torch.zeros(rows, dtype=torch.int64))
    return Inputs(policy, reference, rows_T, **{"memory_budget": 0} | options)


def autocast(dtype: torch.dtype) -> Inputs:
    """fp32 parameters, multiplied in `dtype`."""
    plain = inputs()
    return replace(plain, policy=replace(plain.policy, dtype=dtype))


@pytest.mark.parametrize(
    "made, want",
    [
        (inputs(), True),
        (inputs(T // 2, dtype=torch.float64), True),
        (inputs(0), True),
        (inputs(T + 1, 1), False),
        (inputs(vocab=V + 1), False),
        (inputs(1, V + D), True),
        (inputs(1, V + D + 1), False),  # one row of a large vocabulary would be summed in fewer parts
        (inputs(ref_width=D + 1), False),
        (inputs(1, 2, width=4 * V), True),
        (inputs(1, V, width=4 * V), False),  # dW is larger than a tile
        (inputs(dtype=torch.float64), False),  # twice the bytes
        (inputs(dtype=torch.bfloat16), False),
        (inputs(dtype=torch.float16), False),
        (autocast(torch.bfloat16), False),
        (replace(inputs(T // 2, dtype=torch.float64), reference=inputs(T // 2).reference), False),
        (inputs(partial=True), False),
    ],
)
def test_takes_what_fits_into_a_tile_in_one_dtype(made: Inputs, want: bool):
    assert one_tile.takes(made) is want


def test_the_walk_is_left_to_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch):
    """`tiled` asks, and does as it is told: the numbers are those of either way."""
    problem = small().problem(torch.float64)
    by_itself = forward_and_backward(problem, EVERYTHING)
    monkeypatch.setattr(one_tile, "takes", lambda inputs: False)
    monkeypatch.setattr(one_tile, "forward", None)
    walked = forward_and_backward(problem, EVERYTHING)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(by_itself, walked, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(by_itself, walked, strict=True)), "both went the same way"


def small(**options: object) -> Case:
    return replace(base(9, B=1, L=T // 2, V=V // 2, D=D), options=options)


def forward_and_backward(problem: Problem, budget: int, cotangent: str = "general") -> list[Tensor]:
    live, parts = leaves(problem)
    out = stats_of(live, "tiled", budget, extras=("entropy", "mean_logit", "is_argmax"))
    g = round_cotangents(live, cotangents(cotangent, live.labels))
    values = (out.logp.detach(), out.ref_logp.detach(), out.kl.detach(), *out.extras.values())
    return [*values, *pull((out.logp, out.kl), g, parts)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("cotangent", ["general", "equal"])
@pytest.mark.parametrize("policy, reference", [(0.0, 14.0), (0.0, 30.0), (0.0, 40.0), (14.0, 0.0), (14.0, 15.0)])
def test_rows_sum_to_zero_however_sure_the_label_is(policy, reference, cotangent, dtype, monkeypatch):
    """And every entry is right, where 1 - p_y, or 1 - q_y, has no digits as a difference."""
    monkeypatch.setitem(slab.TILE, "cpu", (1024, 1024))
    case = every_label(surer_than(reference, policy, V=V), [0])
    case = replace(case, hidden=ones_last(case.hidden, 0.0), weight=ones_last(case.weight, 1.0))
    problem, given = case.problem(dtype), cotangents(cotangent, case.labels)
    assert not judge(problem, given).faults(ours(problem, given, "tiled", EVERYTHING)[0])
    live, parts = leaves(problem)
    out = stats_of(live, "tiled", EVERYTHING)
    dh = pull((out.logp, out.kl), tuple(g.to(dtype) for g in given), parts)[0].flatten(0, 1).double()
    size = torch.from_numpy(np.abs(truth(problem, given).dz).sum(-1).astype(np.float64))
    assert (dh[problem.rows()[1], -1].abs() <= 16 * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("apart", [1e-7, 1e-5])
def test_what_logits_nearly_agree_in_is_had_without_rounding(apart: float):
    """Each rounds by more, less its top, than the models are apart."""
    plain = small()
    bias = bias_of(plain).float().double()
    case = replace(plain, weight=0 * plain.weight, ref_weight=0 * plain.ref_weight, bias=bias)
    case = replace(case, ref_bias=bias + bias_of(case, seed=2, size=apart))
    problem, given = case.problem(torch.float32), cotangents("only_kl", case.labels)
    found, want = ours(problem, given, "tiled", EVERYTHING)[0], truth(problem, given).result
    assert np.abs(found.bias - want.bias).max() <= 1e-5 * np.abs(want.bias).max()


def ones_last(x: Tensor, value: float) -> Tensor:
    return torch.cat([x, torch.full_like(x[..., :1], value)], -1)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 0.5}], ids=("plain", "softcap"))
@pytest.mark.parametrize("cotangent", ["general", "only_logp", "only_kl"])
def test_recomputed_for_backward_to_the_bits_that_are_kept(cotangent: str, options: dict, monkeypatch):
    real = one_tile._empty
    monkeypatch.setattr(one_tile, "_empty", lambda *args: real(*args).fill_(math.nan))  # not what forward left there
    problem = small(**options).problem(torch.float64)
    kept, recomputed = (forward_and_backward(problem, b, cotangent) for b in (EVERYTHING, 0))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@pytest.mark.parametrize("softcap, planes", [(None, 3), (3.0, 4)])
def test_keeps_its_planes_if_all_of_them_fit_into_the_budget(softcap: float | None, planes: int):
    size = planes * T * V * torch.float32.itemsize
    for budget, want in ((size, size), (size - 1, 0)):
        call = replace(inputs(), memory_budget=budget)
        call = replace(call, policy=replace(call.policy, head=replace(call.policy.head, softcap=softcap)))
        saved = one_tile.forward(call, ALL).saved
        assert sum(x.nbytes for x in saved if x is not None and x.dim() == 3) == want
    assert one_tile.forward(call, Needs(False, False, False)).saved == ()


def test_a_product_that_is_spared(monkeypatch: pytest.MonkeyPatch):
    """Recomputing for log-probabilities alone asks nothing of the reference."""
    made = []
    real = one_tile.logits_
    monkeypatch.setattr(one_tile, "logits_", lambda *args: (made.append(args), real(*args))[1])
    problem = small().problem(torch.float64)
    for cotangent, want in (("general", 4), ("only_logp", 3)):
        made.clear()
        forward_and_backward(problem, 0, cotangent)
        assert len(made) == want


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows, dtype", [(64, torch.float32), (2000, torch.float32), (512, torch.float64)])
def test_room_for_its_planes_under_torch_compile(rows: int, dtype: torch.dtype, softcap: float | None, monkeypatch):
    monkeypatch.setitem(slab.TILE, "cpu", (1024, 1024))
    call = inputs(rows, 1000, dtype)
    policy = replace(call.policy, head=replace(call.policy.head, softcap=softcap))
    _, stage = room(policy, call.reference, EVERYTHING)
    kept = inputs(min(rows, 1024), 1000, dtype, memory_budget=stage)
    saved = one_tile.forward(replace(kept, policy=replace(kept.policy, head=policy.head)), ALL).saved
    assert saved[-1] is not None
