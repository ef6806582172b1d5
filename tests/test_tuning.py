"""Which configuration is chosen: precedence, what it depends on, and that a table which cannot be read is named."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path

import pytest

from tdpo_kernels import tuning
from tdpo_kernels.tuning import Case, Device, TileConfig, choose, heuristic, winner

H200, STATS = Device("NVIDIA H200", "sm_90"), Case("fused_stats", bias=True)
OWN = heuristic(STATS, "sm_90", 4096)
TUNED = replace(OWN, R=64, stages=3)
ARCHS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter")


def row(config: TileConfig = TUNED, D: int = 4096, **case) -> dict:
    return {"case": {"kernel": "fused_stats", "bias": True, **case}, "D": D, "config": asdict(config), "ms": 20.5}


def won(D: int, V: int, fused: float, tiled: float, itemsize: int = 2) -> dict:
    return {"itemsize": itemsize, "D": D, "V": V, "ms": {"fused": fused, "tiled": tiled}}


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write the H200's table, for the calls that follow."""

    def write(*configs: dict, winners: tuple[dict, ...] = (), file: str = "nvidia-h200.json", **change) -> Path:
        data = {"device": H200.name, "arch": "sm_90", "configs": configs, "winners": winners, **change}
        (tmp_path / file).write_text(json.dumps(data))
        forget()
        return tmp_path / file

    def forget() -> None:
        choose.cache_clear()
        tuning._table.cache_clear()

    monkeypatch.delenv(tuning.SWITCH, raising=False)
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    yield write
    forget()


def test_the_table_comes_before_the_heuristic(measured):
    measured(row())
    assert choose(STATS, H200, 4096) == TUNED
    measured()
    assert choose(STATS, H200, 4096) == OWN != TUNED


def test_a_file_named_in_the_environment_comes_instead_of_the_device_s(measured, monkeypatch):
    measured(row(replace(TUNED, stages=2)))
    monkeypatch.setenv(tuning.SWITCH, str(measured(row(), file="mine.json")))
    assert choose(STATS, H200, 4096) == TUNED
    assert choose(STATS, Device("another", "sm_90"), 4096) == TUNED


def test_a_row_counts_for_the_cases_that_it_names(measured):
    measured(row(extras=False))
    assert choose(replace(STATS, softcap=True), H200, 4096) == TUNED
    for change in (dict(kernel="fused_dz"), dict(bias=False), dict(extras=True)):
        assert choose(replace(STATS, **change), H200, 4096) != TUNED
    assert choose(STATS, Device("NVIDIA H100", "sm_90"), 4096) != TUNED
    wide = TileConfig(1, 2048, warps=16)
    measured(row(wide, kernel="tile_dz", columns=1500))
    chosen = [choose(Case("tile_dz", bias=True, columns=columns), H200, 64) for columns in (1000, 2000, 2048, 2049)]
    assert [config == wide for config in chosen] == [False, True, True, False]


def test_of_several_rows_the_nearest_hidden_size_counts(measured):
    near, far = replace(TUNED, stages=2), replace(TUNED, stages=5)
    measured(row(near, 2048), row(far, 8192))
    assert [choose(STATS, H200, D) for D in (64, 1536, 2304, 5120, 16384)] == [near, near, near, far, far]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", ["16bit", "tf32", "ieee"])
def test_what_is_kept_is_made_again_in_the_same_steps(arch: str, kind: str):
    """The two matrix kernels step along D alike, whatever else tells their cases apart."""
    for width, aligned in product((64, 4096), (False, True)):
        cases = [
            Case(kernel, kind, *flags, aligned)
            for kernel, *flags in product(("fused_stats", "fused_dz"), *[(False, True)] * 4)
        ]
        assert len({choose(case, Device("", arch), width).K for case in cases}) == 1


def test_a_row_with_steps_of_another_size_is_skipped(measured):
    measured(row(replace(TUNED, K=32)), row(TUNED, 512))
    assert choose(STATS, H200, 4096) == TUNED


def test_nothing_depends_on_the_number_of_rows():
    names = {*inspect.signature(choose).parameters, *(field.name for field in fields(Case))}
    assert not names & {"T", "rows", "tokens", "batch"}
    assert choose(STATS, H200, 4096) is choose(STATS, H200, 4096), "and a choice is made once"


def test_winner_of_the_nearest_measured_sizes(measured):
    measured(winners=(won(896, 151936, 9, 11), won(4096, 128256, 101, 88), won(4096, 128256, 5, 6, itemsize=4)))
    assert [winner(H200, 2, 1024, 150000), winner(H200, 2, 8192, 128256)] == ["fused", "tiled"]
    assert winner(H200, 4, 8192, 128256) == "fused"
    assert winner(H200, 8, 4096, 128256) is winner(Device("NVIDIA A100", "sm_80"), 2, 4096, 128256) is None


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(arch="sm_80"), "it was measured on sm_80, this device is sm_90"),
        (dict(configs=[{"D": 64, "config": {"R": 1}}]), "KeyError: 'case'"),
        (dict(configs=[{"case": {}, "D": 64, "config": {"rows": 3}}]), "unexpected keyword argument 'rows'"),
        (dict(winners="none", configs=3), "TypeError"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(measured, change: dict, words: str):
    path = measured(**change)
    with pytest.raises(ValueError, match=words) as error:
        choose(STATS, H200, 4096)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there_is_named(measured, monkeypatch):
    monkeypatch.setenv(tuning.SWITCH, "/nowhere.json")
    with pytest.raises(ValueError, match="the tuning table /nowhere.json: FileNotFoundError"):
        choose(STATS, H200, 4096)


LIKE = {"sm_86": "sm_80", "sm_89": "sm_80", "sm_120": "sm_80", "sm_103": "sm_100", "gfx950": "gfx942"}


@pytest.mark.parametrize("arch", LIKE)
def test_other_architectures_get_what_they_are_most_like(arch: str):
    assert heuristic(STATS, arch, 4096) == heuristic(STATS, LIKE[arch], 4096)


@pytest.mark.parametrize("arch", ["sm_75", "gfx1100", "xe2", ""])
def test_an_unknown_architecture_says_what_there_is(arch: str):
    with pytest.raises(ValueError, match=f"no configuration for '{arch}': there are some for .'gfx942', 'sm_100'"):
        choose(STATS, Device("other", arch), 4096)


def test_a_small_hidden_size_leaves_room_for_a_second_program():
    small = choose(STATS, H200, 512).options
    assert small["maxnreg"] * 32 * small["num_warps"] * 2 <= 65536
    assert "maxnreg" not in OWN.options and not OWN.options["enable_fp_fusion"]


@pytest.mark.parametrize("arch", ARCHS)
def test_the_tile_of_a_row_kernel_is_rounded_up_to_a_width_that_is_compiled(arch: str):
    configs = [choose(Case("tile_stats", columns=columns), Device("", arch), 64) for columns in (1, 1024, 1025, 4096)]
    assert [config.C for config in configs] == [1024, 1024, 2048, 4096]
    with pytest.raises(ValueError, match="a tile of 4097 columns, wanted 4096 at most"):
        choose(Case("tile_dz", columns=4097), Device("", arch), 64)


def test_configurations_need_neither_torch_nor_triton():
    code = """
import sys, types
package = types.ModuleType("tdpo_kernels"); package.__path__ = ["tdpo_kernels"]; sys.modules["tdpo_kernels"] = package
from tdpo_kernels.tuning import Case, Device, choose
choose(Case("fused_stats"), Device("NVIDIA H200", "sm_90"), 64)
print(sorted({"torch", "triton", "numpy"} & set(sys.modules)))
"""
    root = Path(tuning.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root).stdout == "[]\n"
