"""Compiling without a GPU: the core set is sound, and the unsound is found out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from bench.compiled.__main__ import main, print_reports
from bench.compiled.binary import TARGETS, compiled, report, unavailable
from bench.compiled.jobs import LARGE, Job, attempt, build_of, core, jobs
from tdpo_kernels.backends.kerneltiles import FusedTiles, RowTiles
from tdpo_kernels.tuning import SMALL, Case, Device, TileConfig, choose

if reason := unavailable():
    pytest.skip(reason, allow_module_level=True)


KERNELS = {"tiled": RowTiles.KERNELS, "fused": FusedTiles.KERNELS}
CHEAP = Job(Case("tile_dz", columns=1024), TileConfig(4, 1024, warps=8), TARGETS["sm_90"])
DZ, TILE_DZ = Case("fused_dz"), Case("tile_dz", columns=1024)
UNSOUND = {  # what no rule has: a kernel, on a target, with options that no launch gives; and what is said of it
    "spills": (TILE_DZ, TileConfig(4, 1024, warps=8), "sm_90", dict(maxnreg=32), "bytes of stack, 16 allowed"),
    "scratch": (TILE_DZ, TileConfig(8, 1024), "gfx942", dict(waves_per_eu=8), "bytes of stack, 16 allowed"),
    "shared": (DZ, TileConfig(64, 64, 64, 8, 16, True), "sm_90", {}, "of shared memory, sm_90 has 232448"),
    "narrow": (DZ, TileConfig(32, 64, 32, 4, 2), "sm_90", {}, "no product of a whole warpgroup"),
    "refused": (DZ, TileConfig(32, 64, 8), "sm_90", {}, "fused_dz 16bit: does not compile for sm_90"),
}


FAMILIES = ("sm_80", "sm_90", "sm_100", "gfx942")  # the other targets have the configurations of sm_80


def test_the_core_set_is_sound(capfd):
    code = main(["--core", *(word for name in FAMILIES for word in ("--target", name))])
    out = capfd.readouterr().out
    assert code == 0, out
    assert f"{4 * len(FAMILIES)} sound, 0 failed" in out and all(f"\n{name}" in out for name in FAMILIES)
    for name, target in TARGETS.items():
        like = name if name in FAMILIES else "sm_80"
        mine, theirs = ([job.config for job in core(x)] for x in (target, TARGETS[like]))
        assert mine == theirs and len(mine) == 4
        shared = [int(line.split()[-6]) for line in out.splitlines() if line.startswith(like)]
        assert len(shared) == 4 and max(shared) <= target.shared


@pytest.mark.parametrize("what", UNSOUND)
def test_what_is_unsound_is_found_out(what: str):
    case, config, target, options, words = UNSOUND[what]
    build = build_of(Job(case, config, TARGETS[target]))
    (fault,) = report(build._replace(options=build.options | options), TARGETS[target]).faults
    assert words in fault


def test_one_fault_makes_the_command_fail(capfd):
    spilling = replace(CHEAP, config=replace(CHEAP.config, registers=24))
    assert print_reports([spilling, CHEAP], workers=1) == 1
    out = capfd.readouterr().out
    assert "  FAILED: " in out and "bytes of stack, 16 allowed" in out and out.endswith("\n1 sound, 1 failed\n")


def test_tensor_cores_and_bulk_copies_are_counted():
    sm_80, sm_90 = (attempt(next(job for job in core(TARGETS[name]) if job.case == DZ)) for name in ("sm_80", "sm_90"))
    assert sm_80.mma > 0 == sm_80.wide == sm_80.tma
    assert sm_90.mma == sm_90.wide > 0 < sm_90.tma
    assert 0 < sm_90.shared <= TARGETS["sm_90"].shared and 32 <= sm_90.registers <= 255


def test_products_and_sums_are_rounded_one_by_one():
    """Else scaled logits that are equal have a difference, and the same model has a KL that is not 0. The series alone
    asks for what is rounded once: 6 times an entry."""
    build, (R, C, warps) = build_of(CHEAP), (CHEAP.config.R, CHEAP.config.C, CHEAP.config.warps)
    apart, contracted = (
        compiled(build._replace(options=build.options | more), CHEAP.target).asm["ptx"].count("fma.rn.f32")
        for more in ({}, dict(enable_fp_fusion=True))
    )
    assert apart == 6 * R * C // (32 * warps) < contracted


@pytest.mark.parametrize("target", TARGETS)
def test_whatever_is_chosen_is_compiled(target: str):
    made = {(job.case.kernel, job.case.product, job.case.columns, job.config) for job in jobs(TARGETS[target])}
    for kernel, kind, width in product(("fused_stats", "fused_dz"), ("16bit", "tf32", "ieee"), (SMALL, LARGE)):
        for flags in product((False, True), repeat=5):
            case = Case(kernel, kind, *flags)
            if kind != "tf32" or target != "gfx942":
                assert (kernel, kind, 0, choose(case, Device("", target), width)) in made, case
    for kernel, columns in product(("tile_stats", "tile_dz"), (1, 1000, 1024, 2000, 3000, 4096)):
        config = choose(Case(kernel, columns=columns), Device("", target), LARGE)
        assert (kernel, "16bit", config.C, config) in made


@pytest.mark.parametrize("target", TARGETS)
def test_builds_are_named_apart(target: str):
    names = [str(job) for job in jobs(TARGETS[target])]
    assert len(names) == len(set(names))


def test_rows_of_tables_are_compiled_too(tmp_path: Path):
    config = TileConfig(64, 128, 64, 4, 2, True)
    row = {"case": {"kernel": "fused_dz", "bias": True}, "D": 64, "config": vars(config)}
    (tmp_path / "card.json").write_text(json.dumps({"device": "card", "arch": "sm_90", "configs": [row]}))
    *_, last = jobs(TARGETS["sm_90"], tmp_path)
    assert last == Job(Case("fused_dz", bias=True), config, TARGETS["sm_90"], note="card")
    assert jobs(TARGETS["sm_80"], tmp_path) == jobs(TARGETS["sm_80"])


def test_torch_is_not_needed():
    code = """
import sys; sys.modules["torch"] = None
from bench.compiled import binary, jobs
print([jobs.attempt(job).faults for job in jobs.core(binary.TARGETS["gfx942"])[2:]], sys.modules["torch"])"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout == "[(), ()] None\n", done.stderr


def test_the_docs_have_the_report_s_seconds():
    """Compare the seconds for sm_90 in bf16 at D = 4,096, whose tiles are 2,048 columns wide."""
    root = Path(__file__).parents[2]
    lines = (root / "bench" / "results" / "compiled.txt").read_text().splitlines()
    said = (root / "docs" / "gpu.md").read_text()
    for names in KERNELS.values():
        cases = [f"{name} 16bit{' 2048' if name.startswith('tile') else ''} " for name in names]
        found = [line for line in lines for case in cases if re.match(f"sm_90 +{case} ", line)]
        assert len(found) == len(names) and f"{sum(float(line.split()[-1]) for line in found):.1f} s" in said


def test_where_nothing_can_be_compiled_the_command_says_why(monkeypatch, capfd):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main([]) == 2
    assert "nothing can be compiled here: TRITON_INTERPRET is set" in capfd.readouterr().out
