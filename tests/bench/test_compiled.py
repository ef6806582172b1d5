"""Compiling without a GPU: the core set is sound, the unsound is found out, and launches are what was compiled."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.compiled.__main__ import main, print_reports
from bench.compiled.binary import TARGETS, Build, compiled, report, unavailable
from bench.compiled.jobs import LARGE, Job, attempt, build_of, core, jobs
from tdpo_kernels import LMHead
from tdpo_kernels.backends import BACKENDS, grid, kerneltiles, launch, logits, rowmath, selfcheck
from tdpo_kernels.backends.kerneltiles import FUSED_TILE, FusedTiles, RowTiles
from tdpo_kernels.engine import inputs_of
from tdpo_kernels.tuning import SMALL, Case, Device, TileConfig, choose
from tdpo_kernels.types import Model, Needs, Rows, Workspace

if reason := unavailable():
    pytest.skip(reason, allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

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


def test_the_core_set_is_sound(capfd):
    code = main(["--core"])
    out = capfd.readouterr().out
    assert code == 0, out
    assert f"{sum(len(core(target)) for target in TARGETS.values())} sound, 0 failed" in out
    assert all(len(core(target)) == 4 and f"\n{name}" in out for name, target in TARGETS.items())


@pytest.mark.parametrize("what", UNSOUND)
def test_what_is_unsound_is_found_out(what: str):
    case, config, target, options, words = UNSOUND[what]
    build = build_of(Job(case, config, TARGETS[target]))
    (fault,) = report(build._replace(options=build.options | options), TARGETS[target]).faults
    assert words in fault


def test_one_fault_makes_the_command_fail(capfd):
    spilling = replace(CHEAP, config=replace(CHEAP.config, registers=24))
    assert print_reports([spilling, CHEAP]) == 1
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


# --- launches, by Triton's own specialisation: no kernel runs --------------------------------------------------------


@dataclass
class Seen:
    """Which binaries launches on a target want, and what they do for it in the report."""

    target: str
    binaries: dict[launch.Launch, set[frozenset]] = field(default_factory=dict)
    cases: dict[launch.Launch, Case] = field(default_factory=dict)
    last: frozenset = frozenset()

    def run(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **more: Any) -> None:
        _, found, options = _binder(kernel, self.target)(*args, **more)
        self.last = frozenset([*_arguments(found), *options.items()])

    def launch(self, kernels: launch.Kernels, kernel: str, *args: Any, **more: Any) -> None:
        LAUNCH(kernels, kernel, *args, **more)
        made, columns = kernels.launched[kernel], 0 if kernel.startswith("fused") else kernels.columns
        self.binaries.setdefault(made, set()).add(self.last)
        self.cases[made] = replace(kernels.case, kernel=kernel, columns=columns)


LAUNCH = launch.Kernels.launch


@cache
def _binder(kernel: JITFunction, target: str) -> Callable[..., tuple]:
    of = TARGETS[target]
    backend = make_backend(GPUTarget(of.backend, of.arch, of.warp_size))
    return create_function_from_signature(kernel.signature, kernel.params, backend)


def _arguments(specialised: list[tuple]) -> Iterator[tuple]:
    """Yield each argument's index path, type, and its value if it is constant, else whether 16 divides it."""
    for i, (types, marks) in enumerate(specialised):
        nested = isinstance(types, tuple)
        for j, (type_, mark) in enumerate(zip(types, marks, strict=True) if nested else [(types, marks)]):
            yield (i, j) if nested else (i,), type_, mark if type_ == "constexpr" else "D" in (mark or "")


def _of_build(build: Build) -> frozenset:
    """Return the same of what is compiled without a launch."""
    arguments = []
    for i, types in enumerate(build.source.signature.values()):
        nested = isinstance(types, tuple)
        for path, type_ in [((i, j), part) for j, part in enumerate(types)] if nested else [((i,), types)]:
            constant = type_ == "constexpr"
            arguments.append((path, type_, build.source.constants[path] if constant else path in build.source.attrs))
    return frozenset([*arguments, *build.options.items()])


@pytest.fixture(params=("sm_80", "sm_90"))
def seen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Seen:
    it = Seen(request.param)
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **more: it.run(kernel, *args, **more))
    monkeypatch.setattr(launch, "device_of", lambda _: Device("no such device", it.target))
    monkeypatch.setattr(launch.Kernels, "launch", lambda *args, **more: it.launch(*args, **more))
    return it


def launch_all(
    seen: Seen, dtype: torch.dtype, T: int, row: int = 0, *, heavy: bool, one_head: bool = False, first: int = 0
):
    """Launch every kernel on T rows from `row` on, with hidden states that begin `first` elements into their memory."""
    V, col, cpu = 1000, 2000, torch.device("cpu")

    def operands(D: int) -> tuple[LMHead, launch.Head, list[torch.Tensor]]:
        bias, softcap = (torch.zeros(3 * V, dtype=dtype), 30.0) if heavy else (None, None)
        head = LMHead(torch.zeros(3 * V, D, dtype=dtype), bias, 1.0, softcap)
        of_columns = launch.head_of(head, None if bias is None else bias[col : col + V].clone())
        hidden = torch.zeros((row + T) * D + first, dtype=dtype)[first:].view(row + T, D)[row:]
        return head, of_columns, [hidden, head.weight[col : col + V]]

    policy = operands(64)
    reference = policy if one_head else operands(96)
    (head, of_columns, hw), (ref_head, ref_of_columns, gu) = policy, reference
    kernels = launch.Kernels(
        (head, ref_head),
        (dtype, dtype),
        heavy,
        cpu,
        logits.Operand(Workspace(cpu), "", hw[0], None, dtype).is_aligned,
    )
    kernels.columns = V
    labels, label_logits, row_values = torch.arange(row + T)[row:], torch.zeros(2, row + T)[:, row:], torch.zeros(9, T)
    kept, dz = torch.zeros(2, T, 1008)[..., :V], torch.zeros(T, 1008, dtype=dtype)[:, :V]
    parts, height = -(-V // kernels.config("fused_stats").C), 8 if heavy else 6
    states = [torch.zeros(1 + n, height, T)[1:] for n in (parts, 1)]
    where = [of_columns, ref_of_columns], labels, col
    for to in (None, kept):
        kernels.stats([*hw, *gu], *where, states[0], label_logits, to)
    kernels.stats(kept, *where, states[1], label_logits)
    for operands in ([*hw, *gu], kept):
        kernels.dz(operands, *where, row_values, dz)


def test_one_launch_is_one_binary_and_the_one_that_the_report_compiles(seen: Seen):
    """Or a run would compile in its middle, and launch what never checked itself and what nobody looked through."""
    for heavy, one_head, dtype in product((False, True), (False, True), (torch.bfloat16, torch.float32)):
        for T, row in ((1, 0), (16, 0), (33, 16), (50, 33), (128, 50), (131, 1)):
            launch_all(seen, dtype, T, row, heavy=heavy, one_head=one_head)
    assert {made.kernel for made in seen.binaries} == {"fused_stats", "fused_dz", "tile_stats", "tile_dz"}
    for made, binaries in seen.binaries.items():
        assert len(binaries) == 1, f"{made}: {frozenset.union(*binaries) - frozenset.intersection(*binaries)}"
        (binary,), other = binaries, _of_build(build_of(Job(seen.cases[made], made.config, TARGETS[seen.target])))
        assert binary == other, f"{made}: {binary ^ other}"


def test_hidden_states_that_begin_elsewhere_are_another_launch(seen: Seen):
    """On sm_80 the configuration may be the same."""
    for first in (0, 1, 8):
        launch_all(seen, torch.float32, 64, heavy=True, first=first)
    assert len({made for made in seen.binaries if made.kernel == "fused_dz"}) == 2
    assert all(len(binaries) == 1 for binaries in seen.binaries.values())


@pytest.mark.parametrize("said, kind", [("highest", "ieee"), ("high", "tf32")])
def test_fp32_is_multiplied_as_torch_is_told_to(seen: Seen, said: str, kind: str):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(said)
    try:
        launch_all(seen, torch.float32, 64, heavy=False)
    finally:
        torch.set_float32_matmul_precision(before)
    multiplying = [made for made in seen.binaries if made.kernel.startswith("fused")]
    assert len(multiplying) == 2
    for made in multiplying:
        assert seen.cases[made].product == kind
        (binary,) = seen.binaries[made]
        assert any(value == kind for *_, value in binary)


# --- whole calls, whose kernels and products do nothing ---------------------------------------------------------------


def call(T: int, V: int = 5000, D: int = 64, ratio: float = 0.3, backend: str = "tiled", budget: int = 0) -> None:
    """Go through a step on T rows, of which each has a chosen label or a rejected one, or none that counts."""
    hidden, weight = torch.zeros(T, D, dtype=torch.bfloat16), torch.zeros(V, D, dtype=torch.bfloat16)
    labels = torch.randint(V, (T,))
    sides = [Model(hidden, LMHead(weight.clone()), torch.bfloat16) for _ in range(2)]
    inputs = inputs_of(*sides, Rows(None, None, labels))
    kept, row = torch.zeros(budget), torch.zeros(9, T)
    row[5:] = torch.randn(4, T) * (torch.rand(4, T) < ratio)
    BACKENDS[backend].forward(inputs, kept)
    BACKENDS[backend].backward(inputs, Needs(True, True, False), kept, row, None)


@pytest.fixture
def whole_calls(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> Seen:
    monkeypatch.setattr(launch, "unavailable", lambda _: "")
    monkeypatch.setattr(logits, "multiply_", lambda out, *_: out)
    monkeypatch.setattr(logits, "operand_dtype", lambda compute, *_: compute)
    monkeypatch.setattr(rowmath, "merge", lambda parts: parts[0])
    monkeypatch.setattr(selfcheck.Check, "_judge", lambda *_: None)
    monkeypatch.setitem(grid.TILE, "cpu", (256, 1024))
    return seen


@pytest.mark.parametrize("backend", ["tiled", "fused"])
def test_nothing_compiles_again(backend: str, whole_calls: Seen):
    """Whatever the rows, labels and masks, and however much is kept."""
    call(300, backend=backend, budget=2 * 300 * 2000)
    first, known = dict(whole_calls.binaries), KERNELS[backend]
    assert sorted(made.kernel for made in first) == sorted(known)
    for T, ratio, budget in ((1, 1.0, 0), (16, 0.0, 0), (300, 0.5, 0), (255, 0.01, 10**7), (513, 1.0, 10**6)):
        call(T, ratio=ratio, backend=backend, budget=budget)
    assert whole_calls.binaries == first and all(len(binaries) == 1 for binaries in first.values())


@pytest.mark.parametrize("backend", ["tiled", "fused"])
def test_what_a_tile_has_in_common_with_others_is_made_once(backend: str, whole_calls: Seen, monkeypatch):
    """Configurations and what tells binaries apart once in a direction, and nothing more for more tiles."""
    made = []
    for name in ("choose", "Launch"):
        sound = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda *args, name=name, sound=sound: made.append(name) or sound(*args))
    counts = []
    for V in (5000, 15000):
        made.clear()
        call(513, V=V, backend=backend, budget=10**6)
        counts.append({name: made.count(name) for name in made})
    assert counts[0] == counts[1] and counts[0]["Launch"] == len(KERNELS[backend])


@pytest.mark.parametrize("backend", ["tiled", "fused"])
@pytest.mark.parametrize("D, V", [(896, 151936), (2048, 128256), (4096, 128256), (5120, 152064), (8192, 128256)])
def test_tiles_are_as_wide_for_few_rows_as_for_many(backend: str, D: int, V: int, whole_calls: Seen, monkeypatch):
    """On a GPU, where a kernel of another width would compile in the middle of a run."""
    monkeypatch.setattr(grid, "TILE", {"cpu": grid.TILE["cuda"]})
    monkeypatch.setattr(grid, "WORKSPACE", {"cpu": grid.WORKSPACE["cuda"]})
    monkeypatch.setattr(kerneltiles, "tile_of", lambda _: grid.TILE["cpu"] if backend == "tiled" else FUSED_TILE)
    tiles, widths = kerneltiles.RowTiles if backend == "tiled" else kerneltiles.FusedTiles, set()
    for T in (100, 1000, 5000, 8192, 20000, 131072):
        hidden, weight = torch.empty(T, D, dtype=torch.bfloat16), torch.empty(V, D, dtype=torch.bfloat16)
        sides = [Model(hidden, LMHead(weight), torch.bfloat16), Model(hidden, LMHead(weight[:]), torch.bfloat16)]
        index = None if T > 10000 else torch.empty(T, dtype=torch.int64)
        made = tiles(inputs_of(*sides, Rows(index, None, torch.empty(T, dtype=torch.int64))))
        widths.add(made.kernels.config("tile_dz").C)
    assert len(widths) == 1, widths
