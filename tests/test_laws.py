"""Laws 1 to 3: as accurate as plain torch, exact where the mathematics is exact, the same numbers every time."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import CASES, DTYPES, IGNORE, RUNS, Case, Problem, base, bias_of, cotangents, hated_part
from closeness import SIXTEEN_BIT, Judge, exact, judge, leaves, ours, pull, stats_of
from hypothesis import assume, given
from hypothesis import strategies as st
from runnable import mainly
from torch import Tensor

from tdpo_kernels import TokenStats, fused_tdpo_loss
from tdpo_kernels.backends import lacks
from tdpo_kernels.types import Inputs

EVERYTHING = 2**40
BUDGETS = ("nothing", "partial", "everything")
EACH_BUDGET = mainly(("partial",), BUDGETS)  # which stages some tiles and recomputes the others


def budget_of(problem: Problem, name: str) -> int:
    """In bytes; "partial" is about half of the two planes a stage holds."""
    size = 2 if problem.hidden.dtype in SIXTEEN_BIT else problem.stats_dtype.itemsize
    half = problem.labels.numel() * problem.head.weight.shape[0] * size
    return {"nothing": 0, "partial": half * 2 // 3, "everything": EVERYTHING}[name]


CORE = ("scaled", "near_equal_offset", "ruled_out", "softcap")


def length_of(run: tuple[str, str]) -> list[pytest.MarkDecorator]:
    """Where kernels are interpreted, `CORE` with cotangents of every kind at once is enough to look at each time."""
    return [] if run[0] in CORE and run[1] == "general" else [pytest.mark.long]


@functools.cache
def case_of(name: str) -> Case:
    return CASES[name]()


@functools.cache
def judge_of(case: str, dtype: torch.dtype, cotangent: str, device: str = "cpu") -> tuple[Problem, Judge]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem = case_of(case).problem(dtype).to(device)
        return problem, judge(problem, cotangents(cotangent, case_of(case).labels))


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_bytes(x: Tensor) -> bytes:
    return x.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return [as_bytes(x) for x in a] == [as_bytes(x) for x in b]


# --- law 1 ------------------------------------------------------------------------------------------------------------


def law_1_faults(
    backend: str, dtype: torch.dtype, case: str, cotangent: str, budget: str, device: str = "cpu"
) -> list[str]:
    problem, law = judge_of(case, dtype, cotangent, device)
    found, zeros = ours(problem, cotangents(cotangent, case_of(case).labels), backend, budget_of(problem, budget))
    faults = law.faults(found)
    if any(x.count_nonzero() for x in zeros):
        faults.append("something that does not count is not exactly zero")
    return faults


@pytest.mark.parametrize("budget", EACH_BUDGET)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "case, cotangent", [pytest.param(*run, id="-".join(run), marks=length_of(run)) for run in RUNS]
)
def test_as_accurate_as_plain_torch(case, cotangent, dtype, budget, backend, small_tiles):
    small_tiles(*case_of(case).tile)
    if faults := law_1_faults(backend, dtype, case, cotangent, budget):
        pytest.fail("; ".join(faults), pytrace=False)


@pytest.mark.parametrize("budget", EACH_BUDGET)
@pytest.mark.parametrize("cotangent", ("general", "logp_zero", "equal"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=dtype_id)
def test_as_accurate_where_the_reference_alone_allows_a_part(dtype, cotangent, budget, backend, small_tiles):
    """Not among `CASES`: split over ranks, a rank's part has no digits of q there but those that p leaves."""
    case = hated_part()
    small_tiles(*case.tile)
    problem = case.problem(dtype)
    given = cotangents(cotangent, case.labels)
    found, _ = ours(problem, given, backend, budget_of(problem, budget))
    assert not judge(problem, given).faults(found)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_as_accurate_as_plain_torch_on_cuda(dtype, backend, small_tiles):
    faults = []
    for case, cotangent in RUNS:
        small_tiles(*case_of(case).tile)
        for budget in BUDGETS:
            found = law_1_faults(backend, dtype, case, cotangent, budget, "cuda")
            faults += [f"{case}-{cotangent}-{budget}: {fault}" for fault in found]
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=dtype_id)
@pytest.mark.parametrize("case", mainly(("ruled_out",), ("scaled", "more_rows_than_V", "ruled_out")))
@pytest.mark.parametrize("wanted", mainly(((1,), (0, 2)), [(0,), (1,), (2,), (0, 2), (1, 2)]), ids=str)
def test_gradients_are_as_accurate_when_only_some_are_wanted(wanted, case, dtype, backend, small_tiles):
    problem, law = judge_of(case, dtype, "general")
    live, parts = leaves(problem)
    wanted = [i for i in wanted if i < len(parts)]
    for i, x in enumerate(parts):
        x.requires_grad_(i in wanted)
    if not wanted:
        pytest.skip("the case has no bias")
    out = stats_of(live, backend, budget_of(problem, "partial"))
    grads = pull(
        (out.logp, out.kl),
        tuple(g.to(out.kl.dtype) for g in cotangents("general", problem.labels)),
        [parts[i] for i in wanted],
    )
    true = law.truth.result
    found = {
        ("hidden", "weight", "bias")[i]: exact(g).reshape(-1, *g.shape[1:]) for i, g in zip(wanted, grads, strict=True)
    }
    found = {name: x.reshape(getattr(true, name).shape) for name, x in found.items()}
    if faults := law.faults(replace(true, **found)):
        pytest.fail("; ".join(faults), pytrace=False)


def test_backward_runs_twice_on_a_retained_graph(backend, small_tiles):
    live, parts = leaves(case_of("softcap").problem(torch.float32))
    out = stats_of(live, backend, budget_of(live, "partial"))
    g = [x.float() for x in cotangents("general", live.labels)]
    first, second = (torch.autograd.grad((out.logp, out.kl), parts, g, retain_graph=True) for _ in range(2))
    assert same_bits(first, second)


@pytest.mark.long
def test_partial_budget_stages_some_tiles_and_not_others(small_tiles):
    """Or the budgets above would all test the same thing."""
    for name in ("scaled", "softcap"):
        for dtype in (torch.float32, torch.bfloat16):
            problem = case_of(name).problem(dtype)
            nothing, partial, everything = (_kept(problem, budget_of(problem, b)) for b in BUDGETS)
            assert nothing < partial < everything, (name, dtype, nothing, partial, everything)


def _kept(problem: Problem, budget: int) -> int:
    """Bytes from forward to backward."""
    seen = []

    def keep(self: Inputs, *shape: int, dtype: torch.dtype) -> Tensor:
        seen.append(math.prod(shape) * dtype.itemsize)
        return torch.empty(shape, dtype=dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inputs, "keep", keep)
        stats_of(leaves(problem)[0], "tiled", budget)
    return sum(seen)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_kl_is_infinite_where_the_policy_alone_rules_out_a_token(dtype, backend, small_tiles):
    case = replace(base(31), bias=bias_of(base(31)))
    case.bias[100] = -math.inf
    out = stats_of(case.problem(dtype), backend, 0)
    counted = case.problem(dtype).rows()[0]
    assert torch.isposinf(out.kl.flatten()[counted]).all() and torch.isfinite(out.ref_logp).all()


# --- law 2 ------------------------------------------------------------------------------------------------------------

EQUAL = {
    "scaled": lambda: base(40, apart=0.0),
    "peaked": lambda: base(41, apart=0.0, std=30.0),
    "softcap": lambda: replace(base(42, apart=0.0), options=dict(softcap=4.0), ref_options=dict(softcap=4.0)),
    "bias": lambda: with_biases(base(43, apart=0.0), bias_of(base(43), size=30.0)),
    "ruled_out": lambda: with_biases(base(44, apart=0.0), every_tenth_ruled_out(base(44))),
}


def with_biases(case: Case, bias: Tensor) -> Case:
    labels = torch.where(case.labels == IGNORE, IGNORE, case.labels // 10 * 10 + 1)
    return replace(case, bias=bias, ref_bias=bias.clone(), labels=labels.clamp(max=201))


def every_tenth_ruled_out(case: Case) -> Tensor:
    bias = bias_of(case)
    bias[::10] = -math.inf
    bias[64:128] = -math.inf
    bias[1::10] = 0.5
    return bias


def kl_gradients(case: Case, dtype: torch.dtype, backend: str, budget: str) -> tuple[TokenStats, list[Tensor]]:
    problem, parts = leaves(case.problem(dtype))
    out = stats_of(problem, backend, budget_of(problem, budget))
    g_kl = cotangents("general", problem.labels)[1].to(out.kl.dtype)
    return out, list(torch.autograd.grad(out.kl, parts, g_kl))


@pytest.mark.parametrize("budget", EACH_BUDGET)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", mainly(("bias",), EQUAL))
def test_policy_equal_to_reference_gives_exactly_zero(case, dtype, budget, backend, small_tiles):
    """The KL and its gradient exactly, tokens too unlikely for fp32 to hold included."""
    out, grads = kl_gradients(EQUAL[case](), dtype, backend, budget)
    assert same_bits([out.kl, out.logp], [torch.zeros_like(out.kl), out.ref_logp])
    assert max(float(g.abs().max()) for g in grads) == 0.0


@pytest.mark.parametrize("budget", EACH_BUDGET)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_token_both_models_rule_out_gets_no_gradient(dtype, budget, backend, small_tiles):
    """Not even a tiny one: padded rows of a vocabulary must not drift."""
    case = case_of("ruled_out")
    _, (_, weight, bias) = kl_gradients(case, dtype, backend, budget)
    out = torch.isneginf(case.bias)
    assert not weight[out].count_nonzero() and not bias[out].count_nonzero()


@pytest.mark.parametrize("variant, alpha", [("tdpo1", None), ("tdpo2", None), ("tdpo2", 0.0)])
@pytest.mark.parametrize("dtype", mainly((torch.float32,), DTYPES), ids=dtype_id)
def test_policy_equal_to_reference_gives_exactly_log_2(dtype, variant, alpha, backend, small_tiles):
    case = base(45, B=4, apart=0.0)
    out = loss_of(case.problem(dtype), backend, variant=variant, alpha=alpha)
    assert out.loss.item() == torch.tensor(2.0, dtype=out.loss.dtype).log().item()


def loss_of(problem: Problem, backend: str, **options):
    return fused_tdpo_loss(
        problem.hidden, problem.head, problem.ref_hidden, problem.ref_head, problem.labels, backend=backend, **options
    )


@given(
    seed=st.integers(0, 10**6), V=st.sampled_from([1, 2, 3, 63, 64, 65, 131]),
    std=st.sampled_from([0.1, 1.0, 10.0, 40.0]),
    apart=st.sampled_from([0.0, 1e-7, 1e-5, 1e-3, 0.1, 1.0]), shift=st.sampled_from([0.0, 50.0, -1000.0]),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_kl_is_never_negative(seed, V, std, apart, shift, dtype, backend, small_tiles):
    problem = replace(base(seed, L=8, V=V, std=std, apart=apart), ref_bias=torch.full((V,), shift)).problem(dtype)
    assume(not lacks(backend, problem.hidden.device, dtype))
    kl = stats_of(problem, backend, 0).kl
    assert (kl >= 0).all()  # False for nan


SUMMED = ("scaled", "peaked_10", "near_equal", "offset_50", "hated_by_reference_104", "hated_by_policy_1e9")
SUMMED += ("ruled_out_by_policy_first_tile", "shared_ratio_0.1", "shared_ratio_0.5")


def sums_of_dz(case: str, dtype: torch.dtype, cotangent: str, budget: str, backend: str) -> tuple[np.ndarray, ...]:
    """Each row's sum of dz as it comes, and dz as it should be. A column of ones in W, met by zeros in h, makes one
    component of dh that sum."""
    plain = case_of(case)
    hidden = torch.cat([plain.hidden, torch.zeros_like(plain.hidden[..., :1])], -1)
    weight = torch.cat([plain.weight, torch.ones_like(plain.weight[:, :1])], -1)
    problem, parts = leaves(replace(plain, hidden=hidden, weight=weight).problem(dtype))
    out = stats_of(problem, backend, budget_of(problem, budget))
    g = tuple(g.to(out.kl.dtype) for g in cotangents(cotangent, problem.labels))
    total = exact(pull((out.logp, out.kl), g, parts)[0][..., -1].flatten())[problem.rows()[1].numpy()]
    return np.abs(total), judge_of(case, dtype, cotangent)[1].truth.dz


@pytest.mark.parametrize("budget", EACH_BUDGET)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=dtype_id)
@pytest.mark.parametrize("case", mainly(("scaled", "shared_ratio_0.5"), SUMMED))
def test_rows_of_dz_sum_to_zero(case, dtype, budget, backend, small_tiles):
    small_tiles(*case_of(case).tile)
    total, dz = sums_of_dz(case, dtype, "general", budget, backend)
    assert (total <= 16 * torch.finfo(dtype).eps * np.abs(dz).sum(-1)).all()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=dtype_id)
@pytest.mark.parametrize("budget", EACH_BUDGET)
@pytest.mark.parametrize("cols", mainly((2048, 512), (2048, 512, 64)))
def test_rows_of_dz_of_models_that_nearly_agree_sum_to_zero(cols, budget, dtype, backend, small_tiles):
    """Of the KL alone, over so many columns that log-sum-exps, and logits less their tops, round by more than the
    models are apart."""
    small_tiles(16, cols)
    total, dz = sums_of_dz("near_equal_wide", dtype, "logp_zero", budget, backend)
    assert (total <= 16 * torch.finfo(dtype).eps * np.abs(dz).sum(-1)).all()


@pytest.mark.parametrize("budget", EACH_BUDGET)
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=dtype_id)
@pytest.mark.parametrize("cotangent", mainly(("general", "equal"), ("general", "logp_zero", "kl_zero", "equal")))
@pytest.mark.parametrize("case", mainly(("scaled",), (*SUMMED, "shared_ratio_sure")))
def test_rows_of_16_bit_dz_sum_to_zero(case, cotangent, dtype, budget, backend, small_tiles):
    """As nearly as entries rounded each on its own, in this dtype: being staged, which is coarser, leaves no trace."""
    small_tiles(*case_of(case).tile)
    total, dz = sums_of_dz(case, dtype, cotangent, budget, backend)
    assert (total <= 2 * torch.finfo(dtype).eps * np.sqrt((dz * dz).sum(-1))).all()


@pytest.mark.parametrize("dtype", mainly((torch.bfloat16,), DTYPES), ids=dtype_id)
def test_alpha_zero_is_dpo(dtype, backend, small_tiles):
    """Value and gradients, against DPO written out on the logp of the same backend: to the bit."""
    case = base(46, B=4)
    results = []
    for dpo in (False, True):
        problem, parts = leaves(case.problem(dtype))
        if dpo:
            out = stats_of(problem, backend, 0)
            (m_w, m_l) = (out.logp.double().sum(-1) - out.ref_logp.double().sum(-1)).chunk(2)
            loss = -torch.nn.functional.logsigmoid(0.3 * (m_w - m_l)).mean().to(out.logp.dtype)
        else:
            loss = loss_of(problem, backend, beta=0.3, alpha=0.0, memory_budget=0).loss
        results.append([loss, *torch.autograd.grad(loss, parts)])
    assert same_bits(*results)


# --- law 3 ------------------------------------------------------------------------------------------------------------


def everything_of(problem: Problem, backend: str, budget: int) -> tuple[list[Tensor], list[Tensor]]:
    live, parts = leaves(problem)
    out = stats_of(live, backend, budget)
    g = tuple(x.to(out.kl.dtype) for x in cotangents("general", problem.labels))
    return [out.logp, out.ref_logp, out.kl], list(pull((out.logp, out.kl), g, parts))


SAME = ("scaled", "dense", "peaked_10", "softcap", "ruled_out", "more_rows_than_V")


@pytest.mark.parametrize("dtype", mainly((torch.float32, torch.bfloat16), DTYPES), ids=dtype_id)
@pytest.mark.parametrize("case", mainly(("softcap",), SAME))
def test_same_bits_run_to_run(case, dtype, backend, small_tiles):
    problem = case_of(case).problem(dtype)
    for budget in BUDGETS:
        (a, b), (c, d) = (everything_of(problem, backend, budget_of(problem, budget)) for _ in range(2))
        assert same_bits(a, c) and same_bits(b, d)


@pytest.mark.parametrize("dtype", mainly((torch.float32, torch.bfloat16), DTYPES), ids=dtype_id)
@pytest.mark.parametrize("case", mainly(("ruled_out",), SAME))
def test_forward_has_the_same_bits_at_any_budget_and_without_grad(case, dtype, backend, small_tiles):
    problem = case_of(case).problem(dtype)
    none = stats_of(problem, backend, 0)
    for budget in BUDGETS:
        values, _ = everything_of(problem, backend, budget_of(problem, budget))
        assert same_bits(values, [none.logp, none.ref_logp, none.kl])


def agree(a: list[Tensor], b: list[Tensor], dtype: torch.dtype, factor: float = 40.0) -> bool:
    """To rounding: eps of the tensor's dtype, of its largest entry."""

    def close(x: Tensor, y: Tensor) -> bool:
        eps = torch.finfo(x.dtype).eps
        return x.numel() == 0 or bool(((x - y).abs().max() <= factor * eps * y.abs().max()).item())

    return all(close(x.double().to(x.dtype), y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=dtype_id)
@pytest.mark.parametrize("case", mainly(("softcap",), SAME))
@pytest.mark.parametrize("tile", mainly(((7, 48), (512, 2048)), [(1, 16), (7, 48), (512, 2048)]), ids=str)
def test_tile_size_changes_nothing_but_rounding(tile, case, dtype, backend, small_tiles):
    problem = case_of(case).problem(dtype)
    a, b = everything_of(problem, backend, budget_of(problem, "partial"))
    small_tiles(*tile)
    c, d = everything_of(problem, backend, budget_of(problem, "partial"))
    assert agree(c, a, dtype) and agree(d, b, dtype)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=dtype_id)
@pytest.mark.parametrize("case", mainly(("softcap",), ("dense", "peaked_10", "softcap")))
def test_row_order_and_batch_split_change_nothing_but_rounding(case, dtype, backend, small_tiles):
    """Tokens as rows of their own, shuffled, then in two calls; gradients of the weight add up."""
    whole = case_of(case).problem(dtype)
    at, by = whole.rows()
    g = torch.stack([x.flatten()[at] for x in cotangents("general", whole.labels)]).to(whole.stats_dtype)
    order = torch.randperm(len(at))

    def run(pick: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        rows = replace(
            whole, hidden=whole.hidden.flatten(0, 1)[by[pick]], ref_hidden=whole.ref_hidden.flatten(0, 1)[by[pick]],
            labels=whole.labels.flatten()[at[pick]], shift=False,
        )  # fmt: skip
        live, parts = leaves(rows)
        out = stats_of(live, backend, budget_of(whole, "partial"))
        hidden, weight, *_ = pull((out.logp, out.kl), (g[0, pick], g[1, pick]), parts)
        return [out.logp, out.ref_logp, out.kl, hidden], weight

    plain, weight = run(torch.arange(len(at)))
    mixed, mixed_weight = run(order)
    (first, w1), (second, w2) = run(torch.arange(20)), run(torch.arange(20, len(at)))
    assert agree(mixed, [x[order] for x in plain], dtype)
    assert agree([torch.cat(x) for x in zip(first, second, strict=True)], plain, dtype)
    assert agree([mixed_weight, w1 + w2], [weight, weight], dtype)
