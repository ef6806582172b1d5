"""What the benchmark measures is what it says: times, memory, products, drift and whole steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_bench import CPU, TINY, made_up

from bench import drift, measure, memory, step
from bench import roofline as roof
from bench.conditions import conditions
from bench.providers import PROVIDERS, Step, eager
from bench.report import tables as tabled
from bench.roofline import Ceiling


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


def test_flops_bytes_and_units_are_counted_by_hand():
    shape = replace(TINY, T=8, V=10, D=4, pairs=2)
    assert roof.gemm_flops(shape) == 2 * 8 * 10 * 4 and roof.flops(shape) == 4 * 640
    assert roof.flops(replace(shape, trainable=False)) == 3 * 640
    assert roof.flops(replace(shape, valid=0.5)) == 4 * 320
    # forward reads two hidden states and two heads, backward one of each; both gradients are written
    assert roof.bytes_moved(shape, "float32") == 4 * (2 * 32 + 2 * 40 + 32 + 40 + 32 + 40)
    assert roof.bytes_moved(replace(shape, trainable=False, one_head=True), "bfloat16") == 2 * (64 + 40 + 72 + 32)
    assert roof.seconds(shape, "float32", Ceiling(2560.0, 1e9)) == 1.0
    assert roof.seconds(shape, "float32", Ceiling(1e9, 576.0)) == 2.0


def test_a_row_says_its_time_in_products_and_as_percentage_of_the_floor():
    row = made_up(seconds=(0.5, 0.5, 0.5), ratio=(1.25, 1.2, 1.3), ceiling=(2.0 * 32 * 500 * 32 * 10, 1e9))
    assert tabled.in_gemms(row) == 5.0
    shown = tabled.markdown(tabled.tables([row]))
    assert "| 80 %" in shown and "| 5.0 " in shown and "| 1.25 (1.20-1.30)" in shown


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", [1e-8, 1e-2, 10.0])
def test_the_drift_is_what_it_is_said_to_be(target, dtype):
    assert drift.mean_kl(drift.drifted(target, dtype)) == pytest.approx(target, rel=0.05)


def test_drift_tells_errors_apart(monkeypatch):
    off = replace(eager.PROVIDER, kl=lambda problem: 1.01 * eager.kl(problem))
    monkeypatch.setitem(PROVIDERS, "compiled", off)
    monkeypatch.setitem(PROVIDERS, "trl", replace(off, unavailable=lambda shape, device: "planted"))
    who = ["eager", "ours@0", "compiled", "trl"]
    found = drift.study("float32", who, (1e-8, 1.0), conditions(), lambda n: None, CPU)
    by = {(row.shape, row.provider): row for row in found}
    assert by["drift", "trl"].note == "skipped: planted" and len(found) == 7
    assert by["drift-1e-08", "eager"].kl_error > 0.1 > 1e-3 > by["drift-1e-08", "ours"].kl_error
    assert by["drift-1e+00", "compiled"].kl_error == pytest.approx(0.01, rel=1e-3)
    assert by["drift-1e+00", "compiled"].error == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("fixed", "slope"), [(0, 10**6), (10**8, 3 * 10**5), (3 * 10**8, 2 * 10**6)])
def test_the_longest_context_is_long_and_was_measured_to_fit(fixed, slope):
    asked, limit = {}, 10**9
    length, held = step.search(lambda n: asked.setdefault(n, fixed + slope * n), 128, limit)
    assert asked[length] == held <= limit and held > 0.9 * limit and len(asked) <= step.TRIES


def test_a_step_trains_and_everybody_s_is_the_same():
    pytest.importorskip("transformers")
    after = {}
    for name in ("eager", "ours@0"):
        loop = step.Loop(step.SIZES["smallest"], CPU)
        before = loop.policy.lm_head.weight.detach().clone()
        one = loop.step(name, 16)
        one.backward(one.forward())
        after[name] = loop.policy.lm_head.weight.detach()
        assert not torch.equal(after[name], before)
    assert torch.allclose(after["eager"], after["ours@0"], atol=1e-6)
