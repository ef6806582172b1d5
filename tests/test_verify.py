"""`python -m tdpo_kernels verify`: its truth is the oracle's, no nan passes, its command line says what is wrong."""

from __future__ import annotations

import math
from types import SimpleNamespace

import oracle
import pytest
import torch

from tdpo_kernels import __main__ as command
from tdpo_kernels import verify as module
from tdpo_kernels.backends import BACKENDS
from tdpo_kernels.verify import Line, evaluate, problems, relative_error, truth, verify

CPU = torch.device("cpu")
PROBLEMS = {p.name: p for p in problems(CPU)}


def line(error: float, plain: float, allowed: float) -> Line:
    return Line("tiled", "fp32", "flat", "0", "kl", error, plain, allowed)


@pytest.mark.parametrize("error", [math.inf, math.nan])
@pytest.mark.parametrize("allowed", [1e-6, math.inf, math.nan])
def test_no_yardstick_lets_a_nan_pass(error: float, allowed: float):
    assert not line(error, allowed, allowed).passed


@pytest.fixture
def one_problem(monkeypatch: pytest.MonkeyPatch):
    """A short run, on a problem of which plain torch makes nan."""
    monkeypatch.setattr(module, "problems", lambda device: [PROBLEMS["-inf in both"]])
    monkeypatch.setattr(module, "DTYPES", {"fp64": torch.float64, "fp32": torch.float32})


@pytest.mark.parametrize("factor", [math.nan, 1.001])
def test_a_nan_of_plain_torch_s_lets_neither_a_nan_nor_an_error_pass(factor: float, one_problem, monkeypatch):
    """Nor where it is one quantity of several that are right."""
    lines = verify(CPU)
    assert len(lines) == 8 and all(x.passed for x in lines)
    for name, by in (("evaluate", factor), ("plain_torch", math.nan)):
        honest = getattr(module, name)
        spoilt = lambda *a, f=honest, by=by: [x * by if i == 1 else x for i, x in enumerate(f(*a))]  # noqa: E731
        monkeypatch.setattr(module, name, spoilt)
    assert not any(x.passed for x in verify(CPU))


def test_float64_naive_is_not_its_own_judge(one_problem, monkeypatch: pytest.MonkeyPatch):
    naive = BACKENDS["naive"]

    def wrong(*arguments):
        grads = naive.backward(*arguments)
        return grads._replace(weight=grads.weight * (1 + 1e-9))

    monkeypatch.setitem(BACKENDS, "naive", SimpleNamespace(forward=naive.forward, backward=wrong))
    failed = {(x.backend, x.dtype) for x in verify(CPU) if not x.passed}
    assert failed == {("naive", "fp64")}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_truth_is_the_oracle_s(name: str):
    p = PROBLEMS[name]
    exact = truth(p)
    for t in {0, len(p.labels) - 1}:
        z, r = (
            oracle.logits(h[t].tolist(), head.weight.tolist(), None if head.bias is None else head.bias.tolist(),
                          head.logit_scale, head.softcap)
            for h, head in ((p.hidden, p.head), (p.ref_hidden, p.ref_head))
        )  # fmt: skip
        label = int(p.labels[t])
        wants = oracle.logp(z, label), oracle.logp(r, label), oracle.kl(z, r)
        for x, want in zip(exact, wants, strict=False):
            assert x[t].item() == pytest.approx(want, rel=1e-7 if name == "near-equal" else 1e-9, abs=1e-16)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_truth_is_no_backend_s_and_agrees_with_all_to_rounding(name: str):
    p = PROBLEMS[name]
    assert len(truth(p)) == len(evaluate(p, "naive", 0))
    for exact, found in zip(truth(p), evaluate(p, "naive", 0), strict=True):
        assert relative_error(found, exact) < 1e-9


def test_a_backend_that_cannot_run_here_is_named_and_skipped(one_problem, monkeypatch: pytest.MonkeyPatch, capsys):
    told = dict.fromkeys(BACKENDS, "needs CUDA: got cpu") | {"naive": "available: here"}
    monkeypatch.setattr(module, "availability", lambda device: told)
    assert {x.backend for x in verify(CPU)} == {"naive"}
    monkeypatch.setattr(command, "verify", lambda device, report, names: [line(0.0, 0.0, 1.0)])
    assert command.main(["verify", "--device", "cpu"]) == 0
    assert "tiled is skipped: needs CUDA: got cpu" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["meta", "cuda:99", "abacus", "cpu:x"])
def test_a_device_that_cannot_be_used_is_named(device: str, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(["verify", "--device", device])
    assert exit.value.code == 2
    assert f"--device {device}: " in capsys.readouterr().err
