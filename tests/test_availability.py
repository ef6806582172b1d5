"""Hold that a missing part of kernels is said in words, once, and that torch operations do their work."""

from __future__ import annotations

import shutil
import sys
import types
import warnings
from types import SimpleNamespace

import pytest
import torch
from batches import batch

from tdpo_kernels import __main__ as command
from tdpo_kernels import backends, fused_tdpo_loss
from tdpo_kernels.backends import availability, choose, launch
from tdpo_kernels.types import LMHead, Model

GPU = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Settle anew what is there, on a machine with a GPU of compute capability 8.0, a compiler and a driver."""
    triton = types.ModuleType("triton")
    active = SimpleNamespace(get_current_target=lambda: None)
    triton.__version__, triton.__spec__ = "3.6.0", SimpleNamespace(name="triton")
    triton.runtime = SimpleNamespace(driver=SimpleNamespace(active=active))
    triton.knobs = SimpleNamespace(build=SimpleNamespace(impl=None), runtime=SimpleNamespace(interpret=False))
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    it = SimpleNamespace(triton=triton, active=active, device=SimpleNamespace(name="A100", major=8, minor=0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: it.device)
    monkeypatch.setattr(torch.version, "hip", None)
    clear = launch.unavailable.cache_clear, launch.device_of.cache_clear, backends._warn_once.cache_clear
    [forget() for forget in clear]
    yield it
    monkeypatch.undo()
    [forget() for forget in clear]


def test_a_whole_machine_lacks_nothing(machine):
    assert launch.unavailable(GPU) == ""
    assert availability(GPU)["tiled"].endswith(
        "Triton row kernels reduce them, on cuda; the first steps compile 2 kernels"
    )


def test_without_a_c_compiler(machine, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "finds no C compiler: install gcc, or name one in CC" in launch.unavailable(GPU)
    launch.unavailable.cache_clear()
    monkeypatch.setenv("CC", "/opt/cc")
    assert launch.unavailable(GPU) == ""


def test_where_triton_does_not_start(machine):
    def fails():
        raise OSError("Python.h: No such file\nand more")

    machine.active.get_current_target = fails
    assert launch.unavailable(GPU) == "Triton does not start: OSError: Python.h: No such file"


@pytest.mark.parametrize("major, minor", [(7, 0), (7, 5)], ids=["V100", "T4"])
def test_cards_without_bf16_tensor_cores(machine, major: int, minor: int):
    machine.device = SimpleNamespace(name="old", major=major, minor=minor)
    said = launch.unavailable(GPU)
    assert said.startswith(f"no configuration for 'sm_{major}{minor}'") and "sm_80 or newer" in said


@pytest.mark.parametrize("kind", ["xpu", "mps", "cpu"])
def test_devices_that_triton_has_no_compiler_for(machine, kind: str):
    assert f"no compiler for {kind}" in launch.unavailable(torch.device(kind))


@pytest.mark.parametrize(
    "triton, numpy, works", [("3.6.0", "2.5.1", False), ("3.6.0", "2.3.5", True), ("3.7.1", "2.5.1", True)]
)
def test_an_interpreter_older_than_its_numpy(machine, monkeypatch, triton: str, numpy: str, works: bool):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    machine.triton.__version__, machine.triton.knobs.runtime.interpret = triton, True
    monkeypatch.setattr(launch.importlib.metadata, "version", lambda _: numpy)
    said = launch.unavailable(torch.device("cpu"))
    assert said == ("" if works else "the interpreter of Triton 3.6 wants numpy < 2.4, this is 2.5.1")


def test_a_triton_that_cannot_be_imported(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert launch.unavailable(GPU).startswith("triton cannot be imported: ")


def test_auto_warns_once_and_a_named_backend_says_why(machine, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [choose("auto", GPU)[0] for _ in range(3)] == ["tiled"] * 3
    (warning,) = caught
    assert "no kernel runs on cuda:0, torch operations do their work" in str(warning.message)
    assert "no C compiler" in str(warning.message)
    with pytest.raises(ValueError, match="backend: got 'fused', which does not run here: .* no C compiler"):
        choose("fused", GPU)


@pytest.mark.parametrize("D, wanted", [(896, "fused"), (2047, "fused"), (2048, "tiled"), (8192, "tiled")])
def test_where_nothing_was_measured_auto_takes_the_estimated_winner(machine, D: int, wanted: str):
    side = Model(torch.empty(1, D), LMHead(torch.empty(16, D)), torch.bfloat16)
    assert choose("auto", GPU, (side, side))[0] == wanted
    assert backends.auto_says(GPU).endswith("estimated, not measured")


def test_a_cpu_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_tdpo_loss(**batch(torch.float32, 2))


def test_a_configuration_that_is_too_large_is_named(machine, monkeypatch):
    class OutOfResources(Exception):
        pass

    def runs_out(**_):
        raise OutOfResources("shared memory, Required: 131072, Hardware limit: 101376")

    monkeypatch.setattr(launch, "_device_code", lambda _: {(1, 1): runs_out})
    head = LMHead(torch.zeros(16, 16))
    kernels = launch.Kernels((head, head), (torch.float32,) * 2, False, torch.device("cpu"))
    pair = torch.zeros(2, 1, 16)
    with pytest.raises(RuntimeError, match="tile_stats: TileConfig.*too large for .*Required: 131072"):
        kernels.stats(
            pair, [launch.head_of(head, None)] * 2, torch.zeros(1), 0, torch.zeros(1, 6, 1), torch.zeros(2, 1)
        )


def test_env_lists_accelerators_of_every_kind(machine, monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert command.main(["env"]) == 0
    out = capsys.readouterr().out
    assert "xpu:0: " in out and "xpu:1: " in out and "unavailable: Triton has no compiler for xpu" in out
