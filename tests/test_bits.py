"""Law 3: the same bits from run to run and at any budget; the same numbers, to rounding, however the work is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batches import EXTRAS
from cases import COTANGENTS, DTYPES, Problem, cotangents
from closeness import budget_of, dtype_id, leaves, pull, same_bits, stats_of
from runnable import interpreting, mainly
from test_accuracy import case_of
from torch import Tensor
from truth import round_cotangents

SAME = ("scaled", "dense", "peaked_10", "softcap", "ruled_out", "more_rows_than_V")


def everything_of(
    problem: Problem, backend: str, budget: int, cotangent: str = "general", extras: tuple[str, ...] = ()
) -> list[list[Tensor]]:
    """Return the statistics and the gradients."""
    live, parts = leaves(problem)
    out = stats_of(live, backend, budget, extras=extras)
    given = round_cotangents(live, cotangents(cotangent, problem.labels))
    values = [out.logp, out.ref_logp, out.kl, *out.extras.values()]
    return [values, list(pull((out.logp, out.kl), given, parts))]


def differing(a: list[Tensor], b: list[Tensor]) -> str:
    return "; ".join(f"{i}: {int((x != y).sum())} of {x.numel()}" for i, (x, y) in enumerate(zip(a, b, strict=True)))


def kept_at(problem: Problem) -> list[int]:
    """Budgets that keep nothing, a tile, some and most of the tiles, all of them."""
    return [0, 16 * 64 * 8 * 3 // 2, budget_of(problem, 0.3), budget_of(problem, 0.6), 2**40]


ALSO = ("wide", "one_column_left", "softcap_flat", "other_width", "reference_in_other_dtype")
ALSO += ("reference_in_float64", "hated_300_float64")
BUDGETED = [(name, kind) for name in ("scaled", "softcap", "ruled_out") for kind in COTANGENTS]
BUDGETED += [(name, "general") for name in (*SAME, *ALSO) if (name, "general") not in BUDGETED]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("run", mainly((("softcap", "mixed_blocks"), ("ruled_out", "equal")), BUDGETED), ids="-".join)
def test_no_bit_depends_on_the_budget(run, dtype, backend, small_tiles):
    """Neither a value nor a gradient: what is kept is what would be made again."""
    case, cotangent = run
    small_tiles(*case_of(case).tile)
    problem = case_of(case).problem(dtype)
    none, *others = (everything_of(problem, backend, budget, cotangent, EXTRAS) for budget in kept_at(problem))
    for values, grads in others:
        if not same_bits(values, none[0]) or not same_bits(grads, none[1]):
            pytest.fail(differing(values + grads, none[0] + none[1]), pytrace=False)


def test_budgets_of_the_law_keep_some_tiles_and_not_others(small_tiles):
    """Or the law would say nothing: some bytes outlive the forward at each budget, more at a larger one."""
    problem = case_of("scaled").problem(torch.float32)
    sizes = [saved_bytes(leaves(problem)[0], budget) for budget in kept_at(problem)]
    assert sizes == sorted(set(sizes)), sizes


def saved_bytes(problem: Problem, budget: int) -> int:
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        seen[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = stats_of(problem, "tiled", budget)
    assert out.logp.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize("dtype", mainly((torch.float32, torch.bfloat16), DTYPES), ids=dtype_id)
@pytest.mark.parametrize("case", mainly(("softcap",), SAME))
def test_same_bits_run_to_run_and_without_a_gradient(case, dtype, backend, small_tiles):
    problem = case_of(case).problem(dtype)
    (a, b), (c, d) = (everything_of(problem, backend, budget_of(problem, 0.5)) for _ in range(2))
    assert same_bits(a, c) and same_bits(b, d)
    none = stats_of(problem, backend, 2**40)
    assert same_bits(a, [none.logp, none.ref_logp, none.kl])


def agree(a: list[Tensor], b: list[Tensor], factor: float = 40.0) -> bool:
    """To rounding: eps of the tensor's dtype, of its largest entry."""

    def close(x: Tensor, y: Tensor) -> bool:
        eps = torch.finfo(x.dtype).eps
        return x.numel() == 0 or bool(((x == y) | ((x - y).abs() <= factor * eps * y.abs().max())).all())

    return all(close(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=dtype_id)
@pytest.mark.parametrize("case", mainly(("softcap",), SAME))
def test_tile_size_changes_nothing_but_rounding(case, dtype, backend, small_tiles):
    problem = case_of(case).problem(dtype)
    a, b = everything_of(problem, backend, budget_of(problem, 0.5))
    for tile in ((7, 48), (512, 2048), *(() if interpreting() else ((1, 16),))):  # thousands of launches
        small_tiles(*tile)
        c, d = everything_of(problem, backend, budget_of(problem, 0.5))
        assert agree(c, a) and agree(d, b), tile


@pytest.mark.long
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=dtype_id)
def test_parts_of_several_groups_are_one_row(dtype, backend, small_tiles):
    """65 parts are merged in groups, and what fills up the last group counts for nothing."""
    problem = case_of("wide").problem(dtype)
    whole, cut = [], []
    for found, tile in ((whole, (64, 4112)), (cut, (64, 64))):
        small_tiles(*tile)
        found += [x for every in everything_of(problem, backend, 0, extras=EXTRAS) for x in every]
    assert agree(cut, whole)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=dtype_id)
@pytest.mark.parametrize("case", mainly(("softcap",), ("dense", "peaked_10", "softcap")))
def test_row_order_and_batch_split_change_nothing_but_rounding(case, dtype, backend, small_tiles):
    """Tokens as rows of their own, shuffled, then in two calls; gradients of the weight add up."""
    whole = case_of(case).problem(dtype)
    at, by = whole.rows()
    g = torch.stack([x.flatten()[at] for x in cotangents("general", whole.labels)]).to(whole.stats_dtype)
    order = torch.randperm(len(at))

    def run(pick: Tensor) -> tuple[list[Tensor], Tensor]:
        rows = replace(
            whole, hidden=whole.hidden.flatten(0, 1)[by[pick]], ref_hidden=whole.ref_hidden.flatten(0, 1)[by[pick]],
            labels=whole.labels.flatten()[at[pick]], shift=False,
        )  # fmt: skip
        live, parts = leaves(rows)
        out = stats_of(live, backend, budget_of(whole, 0.5))
        hidden, weight, *_ = pull((out.logp, out.kl), (g[0, pick], g[1, pick]), parts)
        return [out.logp, out.ref_logp, out.kl, hidden], weight

    plain, weight = run(torch.arange(len(at)))
    mixed, mixed_weight = run(order)
    (first, w1), (second, w2) = run(torch.arange(20)), run(torch.arange(20, len(at)))
    assert agree(mixed, [x[order] for x in plain])
    assert agree([torch.cat(x) for x in zip(first, second, strict=True)], plain)
    assert agree([mixed_weight, w1 + w2], [weight, weight])
