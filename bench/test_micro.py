"""One step at one small shape, halves apart: ``pytest bench/ --benchmark-only``; ``--benchmark-autosave`` keeps it, and
``pytest-benchmark compare`` holds commits against each other. Nothing that the gate refuses is timed."""

from __future__ import annotations

import pytest

from bench.gate import check
from bench.problem import make_problem
from bench.providers import PROVIDERS, Step
from bench.shapes import Shape

pytest.importorskip("pytest_benchmark")

WHO = ("floor", "eager", "trl", "linear_ce", "ours@all", "ours@0")
SHAPE = Shape("micro", 256, 4008, 128, "llama-3.1-8b/32, few rows", WHO, 20)


@pytest.fixture(params=WHO)
def step(request: pytest.FixtureRequest) -> Step:
    provider, problem = PROVIDERS[request.param], make_problem(SHAPE, "float32")
    if reason := provider.unavailable(SHAPE, problem.hidden.device):
        pytest.skip(reason)
    assert check(provider, SHAPE, "float32").complaint is None
    made = provider.make(problem)
    return Step(lambda: (problem.clear(), made.forward())[1], made.backward)


def test_forward(benchmark, step: Step):
    benchmark.pedantic(step.forward, rounds=SHAPE.rounds, warmup_rounds=2)


def test_backward(benchmark, step: Step):
    benchmark.pedantic(step.backward, setup=lambda: ((step.forward(),), {}), rounds=SHAPE.rounds, warmup_rounds=2)
