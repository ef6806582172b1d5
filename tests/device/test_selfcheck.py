"""The self-check of kernel configurations: what it catches, what it lets pass, and when it does not look."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import replace

import closeness
import numpy as np
import pytest
import torch
from cases import CASES, base, bias_of, cotangents, softcap
from checked_steps import (
    EVERYTHING,
    fresh_process,  # noqa: F401 - for every test here
    problem,
    step,
    wrong_label,
)
from harness import F16, F32
from runnable import mainly

from tdpo_kernels.backends import launch, selfcheck, slab
from tdpo_kernels.backends.selfcheck import sample

KERNELS = {"forward": ("fused_stats", 0), "recomputed": ("fused_dz", 0), "staged": ("staged_dz", EVERYTHING)}


def passed() -> set[str]:
    return {key[0].kernel for key in selfcheck._passed}


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each comparison that is made from here on."""
    made, judge = [], selfcheck._judge

    def counted(inputs, launches, compare):
        made.append(launches[0].kernel)
        judge(inputs, launches, compare)

    monkeypatch.setattr(selfcheck, "_judge", counted)
    return made


# --- kernels that are wrong -------------------------------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, kernel: str, before: Callable | None = None, after: Callable | None = None):
    """`before` changes the arguments of every launch of `kernel`, `after` what it wrote."""
    run = getattr(launch, kernel)

    def planted(*args):
        launched = run(*(before(*args) if before else args))
        if after:
            after(*args)
        return launched

    monkeypatch.setattr(launch, kernel, planted)


def wrong_columns(traits, policy, reference, *rest):
    """The last three columns of weights are read from the first ones: a clipped address."""
    weight = policy.weight.clone()
    weight[-3:] = weight[:3]
    return traits, replace(policy, weight=weight), reference, *rest


def wrong_depth(traits, policy, reference, *rest):
    """The last step along the hidden axis is left out."""
    hidden = policy.hidden.clone()
    hidden[:, -8:] = 0
    return traits, replace(policy, hidden=hidden), reference, *rest


def half_a_sum(traits, policy, reference, labels, states, *_):
    states[-1, 1] *= 0.5


def row_lost(traits, policy, reference, labels, states, *_):
    states[:, :, -1] = states[:, :, 0]


def stale_column(*args):
    dz = args[-1]
    dz[:, -1] = dz[:, 0]


def stale_rows(*args):
    dz = args[-1]
    dz[16:] = dz[:1]


def half_written(*args):
    args[-1][:, ::2] = float("nan")


def without_label(*args):
    """As if the label's entry were one like the others."""
    labels, dz = next(x for x in args if isinstance(x, torch.Tensor) and not x.is_floating_point()), args[-1]
    inside = (labels >= 0) & (labels < dz.shape[1])
    dz[inside, labels[inside]] = 0


FORWARD = {
    "wrong label": dict(before=wrong_label),
    "wrong columns": dict(before=wrong_columns),
    "wrong depth": dict(before=wrong_depth),
    "half a sum": dict(after=half_a_sum),
    "last row": dict(after=row_lost),
}
BACKWARD = {
    "stale column": dict(after=stale_column),
    "stale rows": dict(after=stale_rows),
    "half written": dict(after=half_written),
    "no label": dict(after=without_label),
}


@pytest.mark.parametrize("bug", mainly(("wrong columns", "half a sum"), FORWARD))
@pytest.mark.parametrize("budget", (0, EVERYTHING))
@pytest.mark.parametrize("dtype", mainly((F16,), (F32, F16)), ids=str)
def test_a_wrong_forward_is_caught(monkeypatch, bug, budget, dtype):
    plant(monkeypatch, "fused_stats", **FORWARD[bug])
    for _ in range(2):  # having raised, it does not count as checked
        with pytest.raises(RuntimeError, match="fused_stats"):
            step(problem(dtype), budget)
    assert "fused_stats" not in passed()


@pytest.mark.parametrize("bug", mainly(("stale rows", "no label"), BACKWARD))
@pytest.mark.parametrize("kernel", ("recomputed", "staged"))
@pytest.mark.parametrize("dtype", mainly((F16,), (F32, F16)), ids=str)
def test_a_wrong_backward_is_caught(monkeypatch, bug, kernel, dtype):
    name, budget = KERNELS[kernel]
    plant(monkeypatch, name, **BACKWARD[bug])
    for _ in range(2):
        with pytest.raises(RuntimeError, match=name):
            step(problem(dtype), budget)
    assert passed() >= {"fused_stats"} and name not in passed()


def test_what_forward_staged_wrongly_is_caught_in_backward(monkeypatch):
    def swapped(traits, policy, reference, labels, states, planes):
        if planes is not None:
            planes[1].neg_()

    plant(monkeypatch, "fused_stats", after=swapped)
    with pytest.raises(RuntimeError, match="staged_dz"):
        step(problem(F16))


def test_one_wrong_column_in_the_last_partial_tile_is_caught(monkeypatch):
    """Wherever slabs and tiles end."""
    slab.TILE["cpu"] = (1024, 1024)

    def last(*args):
        args[-1][:, -1] *= 1.5

    plant(monkeypatch, "fused_dz", after=last)
    with pytest.raises(RuntimeError, match="column 210"):
        step(problem(), 0)


def test_the_message_has_what_a_report_needs(monkeypatch):
    plant(monkeypatch, "fused_dz", after=stale_column)
    p = problem()
    with pytest.raises(RuntimeError) as caught:
        step(p, 0)
    text = str(caught.value)
    wanted = [
        "fused_dz", "TileConfig(R=16, C=64, K=32", "torch.", "HAS_BIAS=False", "device:", "cpu", torch.__version__,
        "triton ", "cuda ", "ptxas ", "hidden:", "head.weight:", str(tuple(p.head.weight.shape)), "strides",
        "dz at row", "column", "found", "expected", "allowed", "sampled", 'backend="', f"{selfcheck.SWITCH}=0",
    ]  # fmt: skip
    assert not [word for word in wanted if word not in text], text


# --- kernels that are right -------------------------------------------------------------------------------------------


HARD = (
    "dense", "peaked_10", "peaked_30", "near_equal", "near_equal_offset", "offset_50", "offset_1000", "ruled_out",
    "ruled_out_by_reference", "ruled_out_by_policy", "hated_by_policy_300", "loved_by_reference_300", "softcap",
    "softcap_saturated", "scale_only", "other_width", "shared_ratio_0.5", "sure_of_different_tokens", "V_1", "T_1",
    "surer_by_32", "labels_of_reference",
)  # fmt: skip


@pytest.mark.parametrize("dtype", (F32, F16), ids=str)
@pytest.mark.parametrize("name", mainly(("near_equal_offset", "ruled_out_by_policy"), HARD))
def test_hard_cases_raise_no_alarm(name, dtype, comparisons):
    p = CASES[name]().problem(dtype)
    for budget, kind in ((0, "general"), (EVERYTHING, "general"), (EVERYTHING, "only_logp")):
        selfcheck.forget()
        step(p, budget, kind)
        assert passed() >= {"fused_stats", "staged_dz" if budget else "fused_dz"}
    assert len(comparisons) == 6


@pytest.mark.parametrize("seed", mainly((1, 2), range(8)))
def test_other_seeds_raise_no_alarm(seed):
    case = base(100 + seed, std=2.0 + 3 * seed, apart=10.0 ** -(seed % 4))
    if seed % 2:  # with heads as heavy as they get
        capped = softcap()
        case = replace(case, bias=bias_of(case, seed), options=capped.options, ref_options=capped.ref_options)
    p = case.problem(F16 if seed % 4 < 2 else F32)
    for budget in (0, EVERYTHING):
        step(p, budget)


@pytest.mark.parametrize("name", ("T_0", "all_ignored"))
def test_nothing_to_sample_is_no_check(name):
    step(CASES[name]().problem(F32))


# --- when it looks ----------------------------------------------------------------------------------------------------


def test_each_configuration_is_checked_once(comparisons):
    for _ in range(3):
        step(problem(), 0)
    assert comparisons == ["fused_stats", "fused_dz"] or sorted(comparisons)[0] == "fused_dz" and len(comparisons) == 2
    step(problem())  # staged: other kernels
    assert len(comparisons) == 4
    step(problem(F16))  # another dtype
    assert len(comparisons) == 6
    step(problem(F16, seed=5))  # other numbers
    assert len(comparisons) == 6


def test_the_switch_is_read_at_every_call(monkeypatch, comparisons):
    plant(monkeypatch, "fused_stats", before=wrong_label)
    plant(monkeypatch, "fused_dz", after=stale_column)
    monkeypatch.setenv(selfcheck.SWITCH, "0")
    step(problem(), 0)
    assert not comparisons and not passed()
    monkeypatch.setenv(selfcheck.SWITCH, "1")
    with pytest.raises(RuntimeError, match="fused_stats"):
        step(problem(), 0)


def test_forward_without_gradient_is_checked_too(monkeypatch):
    plant(monkeypatch, "fused_stats", before=wrong_label)
    with torch.no_grad(), pytest.raises(RuntimeError, match="fused_stats"):
        closeness.stats_of(problem(), "fused", 0)


def test_nothing_is_checked_nor_marked_under_capture(monkeypatch, comparisons):
    plant(monkeypatch, "fused_stats", before=wrong_label)
    monkeypatch.setattr(selfcheck, "_may_check", lambda inputs: False)  # what capture makes of it
    step(problem(), 0)
    assert not comparisons and not passed()


def test_what_passed_is_not_read_from_the_device(monkeypatch):
    """Steady state: every look at a tensor's value would go through these."""
    step(problem(), 0)
    for name in ("_judge", "_may_check", "indices"):
        monkeypatch.setattr(selfcheck, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    step(problem(), 0)


def test_torch_s_and_python_s_random_numbers_are_left_alone():
    import random

    before, other, third = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    step(problem())
    assert torch.equal(before, torch.get_rng_state()) and other == random.getstate()
    assert (third == np.random.get_state()[1]).all()


def test_results_are_the_same_with_and_without(monkeypatch):
    g = cotangents("general", problem().labels)
    checked, _ = closeness.ours(problem(), g, "fused", 0)
    monkeypatch.setenv(selfcheck.SWITCH, "0")
    unchecked, _ = closeness.ours(problem(), g, "fused", 0)
    for name in closeness.Result.NAMES[:5]:
        assert (getattr(checked, name) == getattr(unchecked, name)).all()


@pytest.mark.parametrize("where", mainly(("weight", "cotangent"), ("hidden", "weight", "ref_weight", "cotangent")))
@pytest.mark.parametrize("value", mainly((float("inf"),), (float("nan"), float("inf"))))
def test_inputs_that_are_not_finite_are_warned_of_once_and_blamed_on_no_kernel(where, value):
    p = problem()
    g = list(cotangents("general", p.labels))
    if where == "hidden":
        p.hidden[:] = value
    elif where == "cotangent":
        g[1][:] = value
    else:
        (p.head if where == "weight" else p.ref_head).weight[70, 3] = value
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            closeness.ours(p, tuple(g), "fused", 0)
    said = [str(w.message) for w in said if issubclass(w.category, RuntimeWarning) and "self-check" in str(w.message)]
    wanted = {"weight": "head.weight", "ref_weight": "ref_head.weight", "cotangent": "gradient"}.get(where, where)
    assert len(said) == 1 and wanted in said[0]
    assert "fused_dz" not in passed()
    step(problem(), 0)  # and is checked when it can be
    assert "fused_dz" in passed()


def test_threads_that_come_at_once_all_check_and_all_pass(monkeypatch):
    """The interpreter itself runs one kernel at a time."""
    errors: list[BaseException] = []
    turn = threading.Lock()
    for name in ("fused_stats", "fused_dz", "merge_states"):
        run = getattr(launch, name)

        def one_at_a_time(*args, run=run):
            with turn:
                return run(*args)

        monkeypatch.setattr(launch, name, one_at_a_time)

    def work(seed: int) -> None:
        try:
            step(problem(seed=seed), 0)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and passed() >= {"fused_stats", "fused_dz"}


# --- the sample -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length,block,tile", [(1, 1, 16), (64, 64, 16), (65, 32, 16), (4099, 1024, 128), (128256, 2048, 64)]
)
def test_samples_hold_the_ends_and_tile_edges(length, block, tile):
    found, again = (sample.indices(length, block, tile, 64, wanted=[length // 2]) for _ in range(2))
    assert found == again == sorted(set(found)) and len(found) == min(length, 64)
    last = (length - 1) // block * block
    last_tile = last + (length - 1 - last) // tile * tile
    assert {0, length - 1, last_tile, length // 2} <= set(found) and max(found) < length
    if length > 64:
        assert {last - 1, last_tile - 1} <= set(found)
