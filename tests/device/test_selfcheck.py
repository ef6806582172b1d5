"""The check of a kernel at its first use: what it catches, what it lets pass, and when it does not look."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import closeness
import numpy as np
import pytest
import torch
from cases import CASES, Problem, base, bias_of, cotangents
from harness import F16, F32
from runnable import mainly

from tdpo_kernels.backends import grid, launch, selfcheck
from tdpo_kernels.tuning import TileConfig

EVERYTHING = 2**40
KERNELS = {
    ("fused", "fused_stats"): 0, ("fused", "fused_dz"): 0, ("fused", "tile_dz"): EVERYTHING,
    ("tiled", "tile_stats"): 0, ("tiled", "tile_dz"): 0,
}  # fmt: skip
EVERY = pytest.mark.parametrize(("backend", "kernel"), KERNELS, ids=[" ".join(x) for x in KERNELS])


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Nothing checked yet, the switch at its default, and tiles so small that there are edges."""
    monkeypatch.delenv(selfcheck.SWITCH, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(selfcheck, "_passed", set())
    monkeypatch.setattr(launch, "choose", lambda case, *_: TileConfig(16, 128 if case.columns else 64, 32))
    monkeypatch.setitem(grid.TILE, "cpu", (32, 128))
    with np.errstate(over="ignore", invalid="ignore"):
        yield


def problem(dtype: torch.dtype = F32) -> Problem:
    return base(1, L=24, V=140).problem(dtype)


def step(p: Problem, backend: str, budget: int = 0, kind: str = "general") -> None:
    closeness.ours(p, cotangents(kind, p.labels), backend, budget)


def broken(monkeypatch: pytest.MonkeyPatch, kernel: str, spoil: Callable) -> None:
    """`kernel` as a miscompiled one would be: its outputs are spoiled once it has run."""
    sound = launch.Kernels.launch

    def run(self, name, *args, **arguments):
        sound(self, name, *args, **arguments)
        if name == kernel:
            spoil(arguments["dz" if name.endswith("dz") else "states"])

    monkeypatch.setattr(launch.Kernels, "launch", run)


FAULTS = {
    "shifted": lambda x: x.copy_(x.roll(1, -1)),
    "doubled": lambda x: x.mul_(2),
    "a fragment of zeros": lambda x: x[..., ::8].zero_(),
    "nan": lambda x: x[..., ::16].fill_(torch.nan),
}


@EVERY
@pytest.mark.parametrize("fault", mainly(("shifted", "nan"), FAULTS))
def test_garbage_raises_with_what_a_report_needs(monkeypatch, backend, kernel, fault):
    broken(monkeypatch, kernel, FAULTS[fault])
    with pytest.raises(RuntimeError) as error:
        step(problem(), backend, KERNELS[backend, kernel])
    for said in (kernel, "TileConfig(R=16", "found", "expected", "rows: ", "triton", selfcheck.SWITCH):
        assert said in str(error.value), said


def test_a_finding_is_a_file_that_can_be_attached(monkeypatch, tmp_path):
    """Once more for each launch; elsewhere where the current directory takes no file."""
    broken(monkeypatch, "fused_dz", FAULTS["doubled"])
    monkeypatch.setenv(selfcheck.SWITCH, "warn")
    with pytest.warns(RuntimeWarning, match="with .*self-check.*fused_dz.json") as caught:
        step(problem(), "fused")
    (path,) = tmp_path.iterdir()
    facts = json.loads(path.read_text())
    said = next(str(warning.message) for warning in caught if "self-check" in str(warning.message))
    assert str(path) in said and "kernel='fused_dz'" in facts["kernels"][0]
    assert facts["wrong"] <= facts["of"] and facts["torch"] == torch.__version__
    monkeypatch.setattr(selfcheck.os, "access", lambda *_: False)
    monkeypatch.setattr(selfcheck.tempfile, "gettempdir", lambda: tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    selfcheck._passed.clear()
    with pytest.warns(RuntimeWarning, match="elsewhere"):
        step(problem(), "fused")
    assert (tmp_path / "elsewhere" / path.name).read_text() == path.read_text()


def test_a_wrong_label_is_garbage(monkeypatch):
    sound = launch.Kernels.launch

    def run(self, *args, labels, **arguments):
        sound(self, *args, labels=labels + 1, **arguments)

    monkeypatch.setattr(launch.Kernels, "launch", run)
    with pytest.raises(RuntimeError, match="fused_stats"):
        step(problem(), "fused")


@pytest.mark.parametrize("name", mainly((*tuple(CASES)[:6:3], "ruled_out_capped"), CASES))
@pytest.mark.parametrize("dtype", (F32, F16))
def test_rounding_passes(name, dtype):
    """On every case of the laws: logits that are huge, ruled out, nearly equal or sure."""
    for backend, budget in {(backend, budget) for (backend, _), budget in KERNELS.items()}:
        step(CASES[name]().problem(dtype), backend, budget)


@pytest.mark.parametrize("kind", ("kl_zero", "logp_zero", "equal"))
def test_rows_that_spare_a_model_pass(kind):
    p = replace(base(2, L=24, V=140), options=dict(softcap=5.0))
    p = replace(p, bias=bias_of(p)).problem(F32)
    for backend in ("fused", "tiled"):
        step(p, backend, 0, kind)


@EVERY
def test_a_kernel_is_looked_at_once(monkeypatch, backend, kernel):
    """And again with another configuration, which is another kernel."""
    step(problem(), backend, KERNELS[backend, kernel])
    seen = set(selfcheck._passed)
    assert kernel in {made.kernel for made in seen}
    with monkeypatch.context() as patch:
        patch.setattr(selfcheck.Check, "_judge", lambda *_: pytest.fail("looked again"))
        step(problem(), backend, KERNELS[backend, kernel])
    monkeypatch.setattr(launch, "choose", lambda *_: TileConfig(32, 128, 32))
    step(problem(), backend, KERNELS[backend, kernel])
    assert selfcheck._passed > seen


@EVERY
@pytest.mark.parametrize("said", ("0", "warn"))
def test_it_can_be_turned_off_or_down(monkeypatch, backend, kernel, said):
    monkeypatch.setenv(selfcheck.SWITCH, said)
    broken(monkeypatch, kernel, FAULTS["doubled"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(problem(), backend, KERNELS[backend, kernel])
    assert any(kernel in str(w.message) for w in caught) == (said == "warn")
    assert bool(selfcheck._passed) == (said == "warn")


def test_what_is_not_finite_is_put_off():
    """A nan of the caller's is no fault of the kernel's, nor does it prove one sound."""
    p = problem()
    p.hidden[:, 5] = torch.nan
    closeness.stats_of(p, "fused", 0)
    assert not selfcheck._passed
    closeness.stats_of(problem(), "fused", 0)
    assert selfcheck._passed
