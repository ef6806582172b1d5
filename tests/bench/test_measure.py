"""Hold that the benchmark measures what it says: times, memory, products, drift and whole steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_bench import CPU, TINY, made_up, run_tiny

from bench import drift, measure, memory, step
from bench.problem import Step
from bench.providers import PROVIDERS, eager
from bench.report import tables as tabled
from bench.shapes import SHAPES


def test_rounds_are_interleaved_and_shuffled_and_halves_are_apart(monkeypatch):
    clock, order, cleared = [0.0], [], []

    def passes(name: str, seconds: float):
        order.append(name)
        clock[0] += seconds

    steps = {name: Step(lambda n=name: passes(n, 1.0), lambda out, n=name: passes(n, 2.0)) for name in "abc"}
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    samples = measure.times(steps, lambda: cleared.append(1), CPU, 6, 2, lambda: None)
    assert all((s.forward, s.backward, s.both) == (1.0, 2.0, 3.0) for name in "abc" for s in samples[name])
    rounds = ["".join(order[i : i + 12 : 4]) for i in range(0, len(order), 12)]
    assert len(rounds) == 7 and rounds[0] == "abc" and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds[1:])) > 1 and len(cleared) == 7 * 3 * 3


def test_peak_memory_is_that_of_the_step():
    shape = replace(TINY, T=1024, V=16000)
    found = {name: memory.peak_extra(shape, "float32", name, CPU) for name in ("eager", "ours@0")}
    logits = 4 * shape.T * shape.V
    assert 4 * logits < found["eager"] < 8 * logits and found["ours@0"] < logits


def test_the_ceiling_is_that_of_the_best_try(monkeypatch):
    monkeypatch.setitem(measure.GEMM, "cpu", (8, 16, 4))
    monkeypatch.setitem(measure.COPY, "cpu", 1000)
    times = {"product": [measure.Sample(3.0, 0.0), measure.Sample(2.0, 0.0)], "copy": [measure.Sample(4.0, 0.0)]}
    monkeypatch.setattr(measure, "times", lambda steps, *_: [step.forward() for step in steps.values()] and times)
    assert measure.ceiling("float32", CPU) == (2 * 8 * 16 * 4 / 2.0, 2 * 1000 / 4.0)


def test_a_row_says_its_time_in_products_and_as_percentage_of_the_floor():
    row = made_up(seconds=(0.5, 0.5, 0.5), ratio=(1.25, 1.2, 1.3), ceiling=(2.0 * 32 * 500 * 32 * 10, 1e9))
    assert tabled.in_gemms(row) == 5.0
    shown = tabled.markdown(tabled.tables([row]))
    assert "| 80 %" in shown and "| 5.0 " in shown and "| 1.25 (1.20-1.30)" in shown


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["drift-1e-08", "drift-1e-02", "drift-1e+01"])
def test_the_drift_is_what_it_is_said_to_be(name, dtype):
    shape = SHAPES[name]
    assert drift.mean_kl(drift.drifted(shape, dtype)) == pytest.approx(shape.drift, rel=0.05)


def test_drift_tells_errors_apart(monkeypatch):
    off = replace(eager.PROVIDER, kl=lambda problem: 1.01 * eager.kl(problem))
    monkeypatch.setitem(PROVIDERS, "compiled", off)
    monkeypatch.setitem(PROVIDERS, "trl", replace(off, unavailable=lambda shape, device: "planted"))
    monkeypatch.setitem(PROVIDERS, "liger", replace(off, kl=lambda problem: eager.kl(problem) * float("nan")))
    who = ["eager", "ours@0", "compiled", "trl", "liger"]
    near, far = (run_tiny(who, SHAPES[name]) for name in ("drift-1e-08", "drift-1e+00"))
    assert near[0].kl_error > 0.1 > 1e-3 > near[1].kl_error and not near[0].seconds
    assert far[2].kl_error == pytest.approx(0.01, rel=1e-3) and far[2].error == pytest.approx(0.01, rel=1e-3)
    assert near[3].note == "skipped: planted" and near[4].red and near[4].note == "not finite"


@pytest.mark.parametrize(("fixed", "slope"), [(0, 10**6), (10**8, 3 * 10**5), (3 * 10**8, 2 * 10**6)])
def test_the_longest_context_is_long_and_was_measured_to_fit(fixed, slope):
    asked, limit = {}, 10**9
    length, held = step.search(lambda n: asked.setdefault(n, fixed + slope * n), 128, limit)
    assert asked[length] == held <= limit and held > 0.9 * limit and len(asked) <= step.TRIES


def test_a_step_trains_and_everybody_s_is_the_same():
    pytest.importorskip("transformers")
    after = {}
    for name in ("eager", "ours@0"):
        loop = step.setup(SHAPES["step smallest"], "float32", CPU)
        before = loop.policy.lm_head.weight.detach().clone()
        one = loop.step(PROVIDERS[name].make)
        one.backward(one.forward())
        after[name] = loop.policy.lm_head.weight.detach()
        assert not torch.equal(after[name], before)
    assert torch.allclose(after["eager"], after["ours@0"], atol=1e-6)


def test_a_step_is_gated_timed_and_its_context_found(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(memory, "peak_extra", lambda shape, *_: 10**5 * shape.T)
    timed, longest = (run_tiny(["eager"], SHAPES[f"{kind} smallest"])[0] for kind in ("step", "context"))
    assert timed.seconds and timed.error < 1e-5 and timed.peak_extra_bytes == 64 * 10**5 and not timed.ratio
    assert longest.T == 288 and longest.peak_extra_bytes == 288 * 10**5 <= longest.limit_bytes
    assert "144 tokens in 30.0 MB" in tabled.markdown(tabled.tables([longest]))
