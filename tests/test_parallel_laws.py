"""Law 1 for vocabularies that are split over ranks: every case as accurate as plain torch with the whole of it."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import interpreted
import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import CASES, RUNS, Problem, cotangents
from closeness import budget_of, dtype_id, ours
from processes import run
from runnable import interpreting, runnable, set_tiles
from splitting import CUTS, cut, rows_of
from test_accuracy import case_of, judge_of
from truth import Array, Result

from tdpo_kernels.parallel import vocab_parallel

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")

WORLDS = (2, pytest.param(4, marks=pytest.mark.long))
REFERENCES = ("alike", "whole", "elsewhere")


def split(problem: Problem, how: str, reference: str) -> Problem:
    V, me, world = problem.head.weight.shape[0], dist.get_rank(), dist.get_world_size()
    other = {"alike": how, "elsewhere": "one" if how == "even" else "even"}.get(reference)
    ref_head = problem.ref_head
    if other is not None:
        ref_head = vocab_parallel(cut(ref_head, rows_of(V, world, other)[me]))
    head = vocab_parallel(cut(problem.head, rows_of(V, world, how)[me]))
    return replace(problem, head=head, ref_head=ref_head)


def over_ranks(x: Array | None) -> Array | None:
    """Return the sum over ranks of gradients that are zero but for each rank's own rows."""
    if x is None:
        return None
    total = torch.from_numpy(x.astype(np.float64))
    dist.all_reduce(total)
    return total.numpy().astype(np.longdouble)


def same_on_all(found: Result) -> bool:
    digest = hashlib.sha256(b"".join(x.astype(np.float64).tobytes() for x in (found.logp, found.kl, found.hidden)))
    every: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, digest.hexdigest())
    return len(set(every)) == 1


INTERPRETED = 7  # of so many runs one, where kernels are interpreted
EVERY = (5, pytest.param(1, marks=pytest.mark.long))  # in `make test` one of five, in `make parallel` all


def law_1(rank: int, dtype: torch.dtype, every: int) -> None:
    if interpreting():
        interpreted.round_bf16()
    faults = []
    for backend in runnable():
        for n, (name, cotangent) in list(enumerate(RUNS))[:: INTERPRETED if interpreting() else every]:
            how, reference = CUTS[n % len(CUTS)], REFERENCES[n % len(REFERENCES)]
            budget = (0.0, 0.5, 2.0)[n // 4 % 3]
            problem, law = judge_of(name, dtype, cotangent)
            if backend not in runnable("cpu", problem.hidden.dtype, problem.ref_hidden.dtype):
                continue
            set_tiles(*case_of(name).tile)
            given = cotangents(cotangent, case_of(name).labels)
            found, zeros = ours(
                problem, given, backend, budget_of(problem, budget), lambda x, a=how, b=reference: split(x, a, b)
            )
            what = f"{backend}, {name}, {cotangent}, {dtype_id(dtype)}, {budget}, {how}, reference {reference}"
            if not same_on_all(found):
                faults.append(f"{what}: ranks differ")
            found = replace(found, weight=over_ranks(found.weight), bias=over_ranks(found.bias))
            faults += [f"{what}: {fault}" for fault in law.faults(found)]
            if any(x.count_nonzero() for x in zeros):
                faults.append(f"{what}: something that does not count is not exactly zero")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
def test_a_split_vocabulary_is_as_accurate_as_plain_torch_with_a_whole_one(dtype: torch.dtype, world: int, every: int):
    assert {name for name, _ in RUNS} == set(CASES)
    run(law_1, dtype, every, world=world)
