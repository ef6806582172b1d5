"""The benchmark's gate: it refuses to time what is wrong or cannot run, and problems are what they are said to be."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from tiny_bench import CPU, TINY, run_tiny

from bench import gate, memory
from bench.problem import IGNORE, Step, make_problem
from bench.providers import PROVIDERS, eager
from bench.providers.provider import Provider
from bench.report import tables as tabled
from bench.shapes import LAYOUTS, SHAPES

SETTINGS = {
    "plain": {}, "prompts": {"valid": 0.25}, "frozen": {"trainable": False}, "one-head": {"one_head": True},
    "peaked": {"peaked": True}, "softcap": {"softcap": 5.0, "peaked": True}, "forward": {"gradients": False},
}  # fmt: skip


def altered(change) -> Provider:
    """The published formula, but for what `change` does to the problem after its backward."""

    def make(problem):
        right = eager.PROVIDER.make(problem)
        return Step(right.forward, lambda loss: (right.backward(loss), change(problem)))

    return replace(eager.PROVIDER, make=make)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["eager", "linear_ce", "trl", "ours@all", "ours@0"])
def test_gate_lets_the_right_ones_through(name, setting, dtype):
    shape = replace(TINY, **SETTINGS[setting])
    if reason := PROVIDERS[name].unavailable(shape, CPU):
        pytest.skip(reason)
    assert gate.check(PROVIDERS[name], shape, dtype).complaint is None


def test_gate_goes_red_on_planted_wrong_gradients_and_their_time_is_in_no_chart(monkeypatch, tmp_path):
    slightly = altered(lambda problem: problem.weight.grad.mul_(1.001))
    verdict = gate.check(slightly, TINY, "float32")
    assert verdict.error == pytest.approx(1e-3, rel=0.01) and "weight" in verdict.complaint
    monkeypatch.setitem(PROVIDERS, "eager", slightly)
    floor, wrong = run_tiny(["floor", "eager"])
    assert floor.seconds and wrong.seconds and wrong.red
    assert "RED weight is off" in tabled.markdown(tabled.tables([floor, wrong]))
    figures = pytest.importorskip("bench.report.figures")
    wrong = replace(wrong, shape="cpu-32k")
    assert not figures.draw([wrong], tmp_path, "cpu") and figures.draw([replace(wrong, red=False)], tmp_path, "cpu")


def test_gate_goes_red_on_a_missing_gradient_and_on_an_exception(monkeypatch):
    def forget(problem):
        problem.hidden.grad = None

    def fail(problem):
        raise RuntimeError("planted")

    assert "hidden is off by inf" in gate.check(altered(forget), TINY, "float32").complaint
    monkeypatch.setitem(PROVIDERS, "eager", replace(eager.PROVIDER, make=fail))
    _, failed = run_tiny(["floor", "eager"])
    assert failed.red and failed.note == "RuntimeError: planted" and not failed.seconds


def test_less_than_tdpo_is_held_to_the_truth_of_what_it_computes():
    assert gate.check(replace(PROVIDERS["linear_ce"], computes="tdpo2"), TINY, "float32").complaint
    assert gate.check(replace(eager.PROVIDER, computes="dpo"), TINY, "float32").complaint


def test_settings_do_what_they_say():
    base = replace(TINY, T=64, D=64)
    changes = dict(valid=0.25), dict(peaked=True), dict(trainable=False), dict(one_head=True)
    prompts, peaked, frozen, one = (make_problem(replace(base, **change), "float32") for change in changes)
    assert (prompts.labels == IGNORE).float().mean() == 0.75 and replace(base, valid=0.25).rows == 16
    assert (prompts.packed(prompts.labels) != IGNORE).all() and len(prompts.packed(prompts.hidden)) == 16
    assert float((peaked.hidden @ peaked.weight.T).detach().std()) == pytest.approx(8, rel=0.2)
    assert not frozen.weight.requires_grad and set(frozen.gradients()) == {"hidden"}
    assert one.one_head and one.double().one_head and not prompts.one_head


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_strides_and_no_number(layout):
    plain, other = (make_problem(replace(TINY, layout=name), "float32") for name in ("contiguous", layout))
    for name in ("hidden", "weight", "ref_hidden", "ref_weight"):
        assert torch.equal(getattr(plain, name), getattr(other, name))
    strided = [x for x in (other.hidden, other.weight) if not x.is_contiguous()]
    assert len(strided) == (layout != "contiguous") and other.weight.is_leaf
    assert {s.layout for s in SHAPES.values() if s.family == "strided"} == set(LAYOUTS)


@pytest.mark.parametrize("name", ["liger", "cce", "fused@0"])
def test_who_cannot_run_says_why_and_is_not_timed(name):
    floor, absent = run_tiny(["floor", name])
    assert floor.seconds and not absent.seconds and not absent.red
    assert absent.note.startswith("skipped: ")
    assert any(reason in absent.note for reason in ("CUDA", "not installed", "no compiler for cpu"))


def test_what_needs_more_memory_than_there_is_is_not_tried(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: eager.needs(TINY) // 2)
    _, row = run_tiny(["floor", "eager"])
    assert row.note.startswith("out of memory: needs about") and not row.red and row.seconds is None


def test_a_step_that_dies_in_its_own_process_is_not_tried_in_ours(monkeypatch):
    python = sys.executable
    monkeypatch.setattr(sys, "executable", "false")
    _, row = run_tiny(["floor", "eager"])
    assert row.red and "exit 1" in row.note and row.seconds is None
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    real = memory.subprocess.run
    monkeypatch.setattr(memory.subprocess, "run", lambda _, **options: real([python, "-c", script], **options))
    _, row = run_tiny(["floor", "eager"])
    assert not row.red and row.note.startswith("out of memory: exit -9")
