"""Which configuration is chosen: precedence, what it depends on, and that a bad table is named."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest

from tdpo_kernels import tuning
from tdpo_kernels.backends.launch import MERGE_ROWS
from tdpo_kernels.offline import TARGETS
from tdpo_kernels.tuning import Case, Device, TileConfig, choose, winner
from tdpo_kernels.tuning.config import KERNELS
from tdpo_kernels.tuning.heuristic import RULES, heuristic, widths
from tdpo_kernels.tuning.roofline import SHAPES, estimate, occupancy
from tdpo_kernels.tuning.table import Measured, Table, Winner, parse, table_path

H200 = Device("NVIDIA H200", "sm_90")
TUNED, SECOND = TileConfig(64, 128, 64, 8, 3, True, 16), TileConfig(128, 128, 64, 8, 3, True)
PROVENANCE = dict(date="2026-11-30", versions={"triton": "3.7.1", "torch": "2.13.0"})


def measured(D: int = 4096, config: TileConfig = TUNED, **case) -> Measured:
    case = {"kernel": "fused_stats", "product": "16bit", **case}
    return Measured(Case(**case), D, config, 20.5, (SECOND, 21.0), **PROVENANCE)


def won(D: int, V: int, fused: float, tiled: float, itemsize: int = 2) -> Winner:
    return Winner(itemsize, D, V, {"fused": fused, "tiled": tiled}, **PROVENANCE)


@pytest.fixture
def write(tmp_path: Path):
    """Writes a table for the H200; returns the folder."""

    def write_(*rows: Measured, winners: tuple[Winner, ...] = (), arch: str = "sm_90") -> Path:
        table_path(H200, tmp_path).write_text(Table(H200.name, arch, rows, winners).to_json())
        tuning.forget()
        return tmp_path

    return write_


def test_explicit_comes_before_the_table_and_the_table_before_the_heuristic(write):
    ours, folder = TileConfig(16, 32, 64), write(measured())
    assert choose("fused_stats", H200, 2, width=4096, explicit=ours, tables=folder) == ours
    assert choose("fused_stats", H200, 2, width=4096, tables=folder) == TUNED
    assert choose("fused_stats", H200, 2, width=4096) == heuristic(Case("fused_stats", "16bit"), "sm_90") != TUNED


@pytest.mark.parametrize("flag", ["staged", "one_head", "bias", "softcap", "extras", "aligned"])
def test_a_row_is_for_its_own_case_only(write, flag: str):
    change = {flag: flag != "aligned"}
    ours = replace(heuristic(Case("fused_stats", "16bit", **change), "sm_90"), stages=7)
    folder = write(measured())
    assert choose("fused_stats", H200, 2, width=4096, tables=folder, **change) not in (ours, TUNED)
    assert choose("fused_stats", H200, 2, width=4096, tables=write(measured(config=ours, **change)), **change) == ours


def test_a_row_is_for_its_own_device_and_operands_only(write):
    folder = write(measured())
    assert choose("fused_stats", replace(H200, name="NVIDIA H100"), 2, width=4096, tables=folder) != TUNED
    assert choose("fused_stats", H200, 4, width=4096, tables=folder) != TUNED
    assert choose("fused_dz", H200, 2, width=4096, tables=folder) != TUNED


def test_of_several_rows_the_nearest_hidden_size_of_the_same_class_counts(write):
    near, far = replace(TUNED, stages=2), replace(TUNED, stages=5)
    folder = write(measured(2048, near), measured(8192, far))
    found = {D: choose("fused_stats", H200, 2, width=D, tables=folder) for D in (1024, 1536, 2304, 5120, 16384)}
    assert found == {1024: choose("fused_stats", H200, 2), 1536: near, 2304: near, 5120: far, 16384: far}


FLAGS = ("one_head", "bias", "softcap", "extras", "aligned")


@pytest.mark.parametrize("arch", [*RULES, "sm_86", "sm_103", "gfx950", "interpreter"])
@pytest.mark.parametrize("itemsize, ieee", [(2, False), (4, False), (4, True)])
def test_what_is_staged_changes_neither_the_parts_nor_the_order_of_sums(arch: str, itemsize: int, ieee: bool):
    """One C, one K, and rows per warp: as many warps share a row. `test_kernels` looks at what becomes of it."""
    for flags in product((False, True), repeat=len(FLAGS)):
        given = dict(zip(FLAGS, flags, strict=True))
        plain, staged = (
            choose("fused_stats", Device(arch, arch), itemsize, ieee=ieee, staged=staged, **given)
            for staged in (False, True)
        )
        assert (plain.C, plain.K, plain.R / plain.warps) == (staged.C, staged.K, staged.R / staged.warps), given


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("change", [dict(C=64), dict(C=256), dict(warps=4), dict(R=256)])
def test_a_row_that_would_make_staging_change_bits_is_skipped(write, change: dict, staged: bool):
    """The next nearest row counts, and the heuristic where there is none."""
    case = dict(kernel="fused_stats", product="16bit", staged=staged)
    own = heuristic(Case(**case), "sm_90")
    kept, bad = replace(own, stages=2), replace(own, **change)
    found = [
        choose("fused_stats", H200, 2, width=4096, staged=staged, tables=write(*rows))
        for rows in ([measured(4096, bad, **case)], [measured(4096, bad, **case), measured(8192, kept, **case)])
    ]
    assert found == [own, kept]
    dz = dict(kernel="fused_dz", product="16bit")
    free = replace(heuristic(Case(**dz), "sm_90"), **change)
    assert choose("fused_dz", H200, 2, width=4096, tables=write(measured(4096, free, **dz))) == free


def test_nothing_depends_on_the_number_of_rows():
    rows = {"T", "rows", "tokens", "batch", "units"}
    assert not rows & set(inspect.signature(choose).parameters) and not rows & set(Case.__dataclass_fields__)
    assert choose("fused_stats", H200, 2) is choose("fused_stats", H200, 2), "and a choice is made once"


def test_winner_of_the_nearest_measured_sizes(write):
    folder = write(winners=(won(896, 151936, 9, 11), won(4096, 128256, 101, 88), won(4096, 128256, 5, 6, itemsize=4)))
    assert winner(H200, 2, 1024, 150000, folder) == "fused"
    assert winner(H200, 2, 8192, 128256, folder) == "tiled"
    assert winner(H200, 4, 8192, 128256, folder) == "fused"
    assert winner(H200, 2, 4096, 128256, write()) is None
    assert winner(replace(H200, name="NVIDIA A100"), 2, 4096, 128256, folder) is None


def test_a_table_is_read_back_as_it_was_written():
    second = replace(measured(896), runner_up=None)
    table = Table(H200.name, "sm_90", (measured(), second), (won(4096, 128256, 101, 88),))
    assert parse(table.to_json(), "") == table


def row(**change) -> dict:
    data = json.loads(Table("d", "sm_90", (measured(),)).to_json())["configs"][0]
    return {key: value for key, value in {**data, **change}.items() if value != "drop"}


def winner_row(**change) -> dict:
    return {**asdict(won(4096, 128256, 2, 1)), **change}


BAD = [
    ("{", "no JSON"),
    ([], "a list, wanted an object"),
    ({"device": "d", "arch": "sm_90"}, "missing or unknown: configs, winners"),
    ({"configs": {}}, "configs is a dict, wanted a list"),
    ({"device": ""}, "device: '', wanted a name"),
    ({"configs": [row(date="drop")]}, r"configs\[0\]: keys missing or unknown: date"),
    ({"configs": [row(rows=4)]}, r"configs\[0\]: keys missing or unknown: rows"),
    ({"configs": [row(), row()]}, r"configs\[1\] is there twice"),
    ({"configs": [row(date="yesterday")]}, "date is 'yesterday', wanted YYYY-MM-DD"),
    ({"configs": [row(versions={"torch": "2"})]}, "wanted at least triton and torch"),
    ({"configs": [row(ms=0)]}, "ms is 0, wanted a positive number"),
    ({"configs": [row(D=True)]}, "D: True, wanted a positive integer"),
    ({"configs": [row(config={"R": 96})]}, "R is 96, wanted a power of two"),
    ({"configs": [row(config={"R": 128, "warps": 64})]}, "64 warps, wanted 32 at most"),
    ({"configs": [row(config={"R": 128, "threads": 4})]}, "config: .*threads"),
    ({"configs": [row(case={"kernel": "matmul", "product": "16bit"})]}, "kernel 'matmul', wanted one of fused_stats"),
    ({"configs": [row(case={"kernel": "fused_dz", "product": "fp8"})]}, "product 'fp8', wanted one of 16bit"),
    ({"configs": [row(case={"kernel": "fused_dz", "product": "16bit", "staged": True})]}, "more of fused_dz than it l"),
    ({"configs": [row(case={"kernel": "fused_dz", "product": "16bit", "bias": 1})]}, "bias is 1, wanted a bool"),
    ({"configs": [row(runner_up=[1])]}, "runner_up is"),
    ({"configs": [row(runner_up={"config": asdict(SECOND), "ms": 1.0})]}, "less than the winner's"),
    ({"winners": [winner_row(itemsize=8)]}, r"winners\[0\]: itemsize is 8"),
    ({"winners": [winner_row(ms={"fused": 1.0})]}, "wanted one for each of fused, tiled"),
]


@pytest.mark.parametrize("data, words", BAD, ids=[words for _, words in BAD])
def test_a_bad_table_is_named_and_so_is_what_is_wrong(tmp_path: Path, data, words: str):
    whole = {"device": H200.name, "arch": "sm_90", "configs": [], "winners": []}
    if isinstance(data, dict):
        data = data if len(data) == 2 else whole | data
    path = table_path(H200, tmp_path)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(ValueError, match=words) as error:
        choose("fused_stats", H200, 2, tables=tmp_path)
    assert str(path) in str(error.value)


def test_a_table_of_another_architecture_is_refused(write):
    with pytest.raises(ValueError, match="of arch 'sm_80', the device is 'sm_90'"):
        choose("fused_stats", H200, 2, tables=write(arch="sm_80"))


@pytest.mark.parametrize(
    "arch, like",
    [("sm_86", "sm_80"), ("sm_89", "sm_80"), ("sm_120", "sm_80"), ("sm_103", "sm_100"), ("gfx950", "gfx942")],
)
def test_other_architectures_get_what_they_are_most_like(arch: str, like: str):
    case = Case("fused_stats", "16bit")
    assert heuristic(case, arch) == heuristic(case, like)


@pytest.mark.parametrize("arch", ["sm_75", "gfx1100", "xe2", ""])
def test_an_unknown_architecture_says_what_there_is(arch: str):
    with pytest.raises(ValueError, match=f"no configuration for '{arch}': there are some for sm_80"):
        choose("fused_stats", Device("other", arch), 2)
    assert choose("fused_stats", Device("other", arch), 2, explicit=TUNED) == TUNED


@pytest.mark.parametrize("arch", RULES)
@pytest.mark.parametrize("itemsize, ieee", [(2, False), (4, False), (4, True)])
def test_every_case_has_a_configuration(arch: str, itemsize: int, ieee: bool):
    names = ("staged", "one_head", "bias", "softcap", "extras", "aligned")
    for kernel, *flags in product(KERNELS, *[(False, True)] * len(names)):
        given = dict(zip(names, flags, strict=True))
        config = choose(kernel, Device(arch, arch), itemsize, ieee=ieee, **given)
        assert config.stack <= 320
        assert not config.tma or given["aligned"] and arch in ("sm_90", "sm_100")
        assert kernel != "fused_stats" or config.C in (64, 128)
        if kernel in ("fused_stats", "fused_dz") and arch in TARGETS:
            operands = (2 if given["one_head"] else 1) * config.R + config.C
            assert operands * config.K * itemsize * config.stages <= TARGETS[arch].shared_limit


def test_the_caller_s_tile_is_rounded_up_to_a_width_that_is_compiled():
    assert [choose("tile_stats", H200, 2, columns=c).C for c in (0, 1, 1024, 1025, 8192)] == [
        4096,
        1024,
        1024,
        2048,
        8192,
    ]
    assert choose("staged_dz", H200, 2).C == widths("staged_dz")[0] == 128
    with pytest.raises(ValueError, match="a tile of 8193 columns, wanted 8192 at most"):
        choose("tile_dz", H200, 2, columns=8193)


def test_merge_states_is_launched_as_it_is_compiled():
    assert choose("merge_states", H200, 4) == TileConfig(MERGE_ROWS, warps=1)


def test_the_interpreter_has_small_tiles():
    assert choose("fused_stats", Device("interpreter", "interpreter"), 4) == TileConfig(32, 128, 64)
    assert choose("tile_stats", Device("interpreter", "interpreter"), 4, columns=1000).C == 1024


def test_operands_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="operands of 8 bytes, wanted 2 or 4"):
        choose("fused_stats", H200, 8)


def test_estimates_are_arithmetic():
    case, config, (shape, _) = Case("fused_stats", "16bit"), SECOND, SHAPES
    e = estimate(case, config, registers=255, shared=96 * 1024, shape=shape)
    assert e.programs == 1 and e.bound == "cache" and e.seconds == e.cache
    assert e.compute == pytest.approx(4 * 8192 * 4096 * 128256 / 989e12)
    assert e.cache == pytest.approx(4 * 8192 * 4096 * 128256 * 2 * (1 / 128) / 5.5e12)
    assert estimate(replace(case, one_head=True), config, 255, 96 * 1024, shape).cache < e.cache
    assert occupancy(replace(config, warps=4), registers=168, shared=72 * 1024) == 3


def test_configurations_need_neither_torch_nor_triton():
    code = """
import sys, types
package = types.ModuleType("tdpo_kernels"); package.__path__ = ["tdpo_kernels"]; sys.modules["tdpo_kernels"] = package
from tdpo_kernels.tuning import Device, choose
choose("fused_stats", Device("NVIDIA H200", "sm_90"), 2)
print(sorted({"torch", "triton", "numpy"} & set(sys.modules)))
"""
    root = Path(tuning.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root).stdout == "[]\n"
