"""The command `kernels`: the core set compiles soundly here, and what is unsound makes it fail."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tdpo_kernels import kernels, offline, tuning
from tdpo_kernels.kernels import Job, build_of, core, main, report, shipped
from tdpo_kernels.offline import TARGETS
from tdpo_kernels.tuning import Case, Device, TileConfig, choose
from tdpo_kernels.tuning.heuristic import RULES, heuristic
from tdpo_kernels.tuning.table import Measured, Table

if reason := offline.unavailable():
    pytest.skip(reason, allow_module_level=True)

SPILLING = Job(Case("staged_dz", "16bit", columns=1024), TileConfig(8, 1024, warps=1), TARGETS["sm_90"])
NARROW = Job(Case("fused_dz", "16bit"), TileConfig(32, 64, 32, 4, 2), TARGETS["sm_90"])
CHEAP = Job(Case("staged_dz", "16bit", columns=128), TileConfig(16, 128), TARGETS["sm_90"])


def test_the_core_set_is_sound(capfd):
    code = main(["--core", "--roofline"])
    out = capfd.readouterr().out
    assert code == 0, out
    assert f"{sum(len(core(target)) for target in TARGETS.values())} sound, 0 failed" in out
    assert "estimates on H200, not measured" in out and "8192 x 4096 x 128256" in out
    assert all(f" {target} " in out for target in TARGETS)


def test_the_report_is_written_to_a_file_under_the_command_that_made_it(tmp_path: Path, monkeypatch, capfd):
    monkeypatch.setattr(kernels, "core", lambda target: [CHEAP])
    out = tmp_path / "out.txt"
    assert main(["--core", "--roofline", "--target", "sm_90", "--out", str(out)]) == 0
    first, _, *rest = out.read_text().splitlines()
    assert first == f"python -m tdpo_kernels kernels --target sm_90 --core --roofline --out {out}"
    assert "not\nmeasurements" in "\n".join(rest) and rest[-1] == "1 sound, 0 failed"
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("fusion, contracted", [(None, False), (True, True)])
def test_products_and_sums_are_rounded_one_by_one(fusion: bool | None, contracted: bool):
    """Or scaled logits that are equal have a difference on a GPU, and the same model a KL that is not 0."""
    build = build_of(CHEAP)
    options = build.options if fusion is None else {**build.options, "enable_fp_fusion": fusion}
    compiled, _ = offline._compile(replace(build, options=options), CHEAP.target)
    assert ("fma.rn.f32" in compiled.asm["ptx"]) == contracted


def test_a_configuration_that_spills_makes_the_command_fail(monkeypatch, capfd):
    monkeypatch.setattr(kernels, "core", lambda target: [SPILLING, CHEAP])
    assert main(["--core", "--target", "sm_90"]) == 1
    out = capfd.readouterr().out
    assert "FAILED" in out and "bytes of stack, 0 allowed" in out and "1 sound, 1 failed" in out


def test_a_configuration_that_does_not_compile_makes_the_command_fail(capfd):
    assert report([replace(NARROW, config=TileConfig(32, 64, 8)), CHEAP]) == 1
    assert "FAILED: fused_dz 16bit: does not compile for sm_90" in capfd.readouterr().out


def test_no_wgmma_where_it_is_wanted_makes_the_command_fail(capfd):
    assert report([NARROW]) == 1
    assert "no wgmma though it is wanted" in capfd.readouterr().out


def test_a_row_of_a_table_that_no_launch_uses_makes_the_command_fail(capfd):
    case = Case("fused_stats", "16bit")
    config = replace(heuristic(case, "sm_90"), C=64)
    assert report([Job(case, config, TARGETS["sm_90"], origin="card")]) == 1
    assert "FAILED: card: staging would change bits of the statistics" in capfd.readouterr().out


def test_where_nothing_can_be_compiled_the_command_says_why(monkeypatch, capfd):
    monkeypatch.setattr(offline, "unavailable", lambda target: "triton has gone fishing")
    assert main([]) == 2
    assert "nothing can be compiled here: triton has gone fishing" in capfd.readouterr().out


@pytest.mark.parametrize("target", TARGETS)
def test_every_rule_is_compiled_plain_or_at_its_heaviest(target: str):
    used = {rule for job in shipped(TARGETS[target]) for rule in RULES[target] if _is_first(rule, job.case, target)}
    assert used == set(RULES[target])


def _is_first(rule, case: Case, target: str) -> bool:
    return next((other for other in RULES[target] if other.fits(case)), None) is rule


@pytest.mark.parametrize("target", TARGETS)
def test_whatever_is_chosen_is_compiled(target: str):
    """Any flags: the configuration occurs in the report for the same kernel, product and alignment."""
    checked = {(job.case.kernel, job.case.product, job.config) for job in shipped(TARGETS[target])}
    for flags in range(64):
        names = ("staged", "one_head", "bias", "softcap", "extras", "aligned")
        given = {name: bool(flags >> i & 1) for i, name in enumerate(names)}
        for itemsize, ieee in ((2, False), (4, False), (4, True)):
            for kernel in ("fused_stats", "fused_dz"):
                kind = "16bit" if itemsize == 2 else "ieee" if ieee else "tf32"
                if kind in kernels.PRODUCTS[target]:
                    config = choose(kernel, Device("", target), itemsize, ieee=ieee, **given)
                    assert (kernel, kind, config) in checked, given


@pytest.mark.parametrize("target", TARGETS)
def test_a_row_is_summed_in_the_same_order_staged_or_not(target: str):
    """Tiles may differ in their rows, not in how columns are spread over a thread's registers, lanes and warps."""
    case = Case("fused_stats", "16bit")
    plain, staged = (_row_layouts(replace(case, staged=staged), target) for staged in (False, True))
    assert len(plain) == 1 and plain == staged


def test_another_split_of_rows_is_seen():
    case, config = Case("fused_stats", "16bit"), TileConfig(128, 128, 64, 8, 3, True)
    assert _row_layouts(case, "sm_90", config) != _row_layouts(case, "sm_90")


def _row_layouts(case: Case, target: str, config: TileConfig | None = None) -> set[str]:
    """Layouts of the tiles whose rows are reduced, without how many warps there are along the rows."""
    build = build_of(Job(case, config or heuristic(case, target), TARGETS[target]))
    text = offline._compile(build, TARGETS[target])[0].asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.M))
    reduced = re.findall(r"\}\) : \(tensor<\d+x\d+xf32, (#\w+)>\) ->", text)
    return {re.sub(r"warpsPerCTA = \[\d+, ", "warpsPerCTA = [_, ", layouts[name]) for name in reduced}


def test_every_build_fits_its_kernel():
    from tdpo_kernels.offline import _check

    for target in TARGETS.values():
        for job in shipped(target):
            _check(build_of(job))


def test_no_binary_is_for_one_number_of_rows():
    """Else a batch of another size would compile in the middle of a run, and launch what never checked itself."""
    from tdpo_kernels.device.tile import VARYING

    made = {job.case.kernel: build_of(job) for job in shipped(TARGETS["sm_90"])}
    varying = {
        name: {parameter.name for parameter in build.kernel.params if parameter.do_not_specialize}
        for name, build in made.items()
    }
    assert len(made) == 6 and set().union(*varying.values()) == set(VARYING)
    for name, build in made.items():
        assert "T" in varying[name] and not varying[name] & set(build.divisible)
        assert varying[name] == set(VARYING) & set(build.kernel.arg_names)


def test_builds_are_named_apart():
    for target in TARGETS.values():
        names = [(job.name, job.config) for job in shipped(target)]
        assert len(names) == len(set(names))


def test_tables_are_compiled_too(tmp_path: Path):
    config = TileConfig(64, 128, 32, 4, 2, True)
    row = Measured(Case("fused_dz", "16bit"), 4096, config, 1.0, None, "2026-11-30", {"triton": "3", "torch": "2"})
    (tmp_path / "card.json").write_text(Table("card", "sm_90", (row,)).to_json())
    tuning.forget()
    extra = [job for job in shipped(TARGETS["sm_90"], tmp_path) if job.origin == "card"]
    assert [(job.case, job.config) for job in extra] == [(row.case, config)]
    assert len(shipped(TARGETS["sm_80"], tmp_path)) == len(shipped(TARGETS["sm_80"]))


def test_the_command_needs_no_torch():
    root = Path(kernels.__file__).parent.parent
    command = [sys.executable, "tests/without_torch.py", "--core", "--target", "gfx942"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout


def test_16_bit_and_tf32_tiles_take_the_same_bytes():
    for case in (Case("fused_stats", "16bit"), Case("fused_dz", "16bit", bias=True)):
        wide = heuristic(replace(case, product="tf32"), "sm_90")
        assert wide == replace(heuristic(case, "sm_90"), K=wide.K) and 2 * wide.K == heuristic(case, "sm_90").K
