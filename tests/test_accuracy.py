"""Law 1: as accurate as plain torch in the same dtype, on every case, values and all gradients."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace

import pytest
import torch
from cases import CASES, DTYPES, RUNS, Case, Problem, cotangents, hated_part
from closeness import Judge, budget_of, dtype_id, judge, leaves, ours, pull, stats_of
from runnable import mainly, runnable, takes
from truth import exact

from tdpo_kernels.backends import BACKENDS

CORE = ["scaled", "near_equal_offset", "ruled_out", "softcap", "sure_20", "offset_1000", "V_1"]
CORE += ["hated_by_reference_300", "loved_by_policy_104", "ruled_out_capped"]
CORE = [(case, "general") for case in CORE]
CORE += [("softcap", "mixed_blocks"), ("softcap", "equal"), ("ruled_out", "logp_zero")]


def length_of(run: tuple[str, str]) -> list[pytest.MarkDecorator]:
    """Mark all but `CORE` as long, for interpreted kernels are looked at with `CORE` each time."""
    return [] if run in CORE else [pytest.mark.long]


@functools.cache
def case_of(name: str) -> Case:
    return CASES[name]()


@functools.cache
def judge_of(case: str, dtype: torch.dtype, cotangent: str, device: str = "cpu") -> tuple[Problem, Judge]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem = case_of(case).problem(dtype).to(device)
        return problem, judge(problem, cotangents(cotangent, case_of(case).labels))


def law_1_faults(backend: str, dtype: torch.dtype, case: str, cotangent: str, device: str = "cpu") -> list[str]:
    """Return faults at a budget that keeps some tiles and not others. By law 3 no bit depends on it."""
    problem, law = judge_of(case, dtype, cotangent, device)
    found, zeros = ours(problem, cotangents(cotangent, case_of(case).labels), backend, budget_of(problem, 0.5))
    faults = law.faults(found)
    if any(x.count_nonzero() for x in zeros):
        faults.append("something that does not count is not exactly zero")
    return faults


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "case, cotangent", [pytest.param(*run, id="-".join(run), marks=length_of(run)) for run in RUNS]
)
def test_as_accurate_as_plain_torch(case, cotangent, dtype, backend, small_tiles):
    small_tiles(*case_of(case).tile)
    if faults := law_1_faults(backend, dtype, case, cotangent):
        pytest.fail("; ".join(faults), pytrace=False)


@pytest.mark.parametrize("cotangent", ("general", "logp_zero", "equal"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=dtype_id)
def test_as_accurate_where_the_reference_alone_allows_a_part(dtype, cotangent, backend, small_tiles):
    """Not among `CASES`: split over ranks, a rank's part has no digits of q there but those that p leaves."""
    case = hated_part()
    small_tiles(*case.tile)
    problem, given = case.problem(dtype), cotangents(cotangent, case.labels)
    found, _ = ours(problem, given, backend, budget_of(problem, 0.5))
    assert not judge(problem, given).faults(found)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_as_accurate_as_plain_torch_on_cuda(name, small_tiles):
    faults = []
    for dtype in DTYPES if name in runnable("cuda") else ():
        for case, cotangent in RUNS if takes(name, dtype, "cuda") else ():
            small_tiles(*case_of(case).tile)
            found = law_1_faults(name, dtype, case, cotangent, "cuda")
            faults += [f"{dtype_id(dtype)}-{case}-{cotangent}: {fault}" for fault in found]
    if faults:
        pytest.fail("\n".join(faults), pytrace=False)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=dtype_id)
@pytest.mark.parametrize("case", mainly(("ruled_out",), ("more_rows_than_V", "ruled_out")))
@pytest.mark.parametrize("wanted", mainly(((0, 2),), [(0,), (1,), (2,), (0, 2), (1, 2)]), ids=str)
def test_gradients_are_as_accurate_when_only_some_are_wanted(wanted, case, dtype, backend, small_tiles):
    problem, law = judge_of(case, dtype, "general")
    live, parts = leaves(problem)
    wanted = [i for i in wanted if i < len(parts)] or [0]
    for i, x in enumerate(parts):
        x.requires_grad_(i in wanted)
    out = stats_of(live, backend, budget_of(problem, 0.5))
    given = tuple(g.to(out.kl.dtype) for g in cotangents("general", problem.labels))
    grads = pull((out.logp, out.kl), given, [parts[i] for i in wanted])
    true, found = law.truth.result, {}
    for i, g in zip(wanted, grads, strict=True):
        name = ("hidden", "weight", "bias")[i]
        found[name] = exact(g).reshape(getattr(true, name).shape)
    assert not law.faults(replace(true, **found))
