"""Compiling with no GPU: what is reported of sound kernels, and that unsound ones are found out."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tdpo_kernels import offline
from tdpo_kernels.offline import TARGETS, Build, compile_for, table

if reason := offline.unavailable():
    pytest.skip(reason, allow_module_level=True)

import triton
import triton.language as tl

NVIDIA = ["sm_80", "sm_90", "sm_100"]


@triton.jit
def matmul(a, b, c, M, N, K, IEEE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c = a b^T by pointers; the steps along K are whole."""
    m, n, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        x = tl.load(a + m[:, None] * K + (start + k)[None, :], (m < M)[:, None], 0.0)
        y = tl.load(b + n[:, None] * K + (start + k)[None, :], (n < N)[:, None], 0.0)
        acc = tl.dot(x, y.T, acc, input_precision="ieee" if IEEE else "tf32")
    tl.store(c + m[:, None] * N + n[None, :], acc.to(c.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])


@triton.jit
def matmul_tma(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        acc = tl.dot(a.load([m, start]), b.load([n, start]).T, acc)
    c.store([m, n], acc.to(tl.bfloat16))


@triton.jit
def matmul_persistent(a, b, c, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """One program walks along N: a loop around the main loop, with an epilogue that wants registers."""
    m = tl.program_id(0) * BM
    total = tl.zeros((BM, BN), tl.float32)
    for n in range(0, N, BN):
        acc = tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            acc = tl.dot(a.load([m, start]), b.load([n, start]).T, acc)
        total += tl.exp(acc - tl.max(acc, 1)[:, None])
    c.store([m, 0], total.to(tl.bfloat16))


@triton.jit
def row_sums(x, out, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """No products. Its loop carries ROWS x BLOCK sums."""
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, N, BLOCK):
        acc += tl.exp(tl.load(x + rows[:, None] * N + (start + cols)[None, :]))
    tl.store(out + rows, tl.sum(acc, 1))


def pointers(bm: int = 128, bn: int = 128, bk: int = 64, dtype: str = "bf16", warps: int = 8, stages: int = 3) -> Build:
    return Build(
        "matmul",
        matmul,
        {"a": f"*{dtype}", "b": f"*{dtype}", "c": f"*{dtype}", "M": "i32", "N": "i32", "K": "i32"},
        {"IEEE": False, "BM": bm, "BN": bn, "BK": bk},
        {"num_warps": warps, "num_stages": stages},
        divisible=("a", "b", "c", "M", "N", "K"),
        wants_wgmma=True,
    )


def descriptors(kernel=matmul_tma, bm: int = 128, bn: int = 128, bk: int = 64) -> Build:
    blocks = {"a": (bm, bk), "b": (bn, bk), "c": (bm, bn)}
    types = {name: f"tensordesc<bf16[{rows}, {cols}]>" for name, (rows, cols) in blocks.items()}
    sizes = {name: "i32" for name in ("N", "K") if name in kernel.arg_names}
    return Build(
        kernel.fn.__name__,
        kernel,
        {**types, **sizes},
        {"BM": bm, "BN": bn, "BK": bk},
        {"num_warps": 8, "num_stages": 3},
        divisible=tuple(sizes),
        wants_wgmma=True,
    )


def sums(rows: int, block: int, warps: int) -> Build:
    signature = {"x": "*fp32", "out": "*fp32", "N": "i32"}
    return Build("row_sums", row_sums, signature, {"ROWS": rows, "BLOCK": block}, {"num_warps": warps}, ("x", "N"))


SPILLING = {  # none for sm_100: there accumulators live in tensor memory
    "sm_80": pointers(128, 256, 16, warps=4),
    "sm_90": pointers(128, 512, 16, warps=4),
    "gfx942": pointers(256, 256, 16, warps=2, stages=1),
}


def sound(target: str) -> list[Build]:
    """Descriptors are taken apart on sm_80, into 64-bit addresses that do not fit beside the larger tile."""
    return [pointers(), descriptors(bm=64, bn=64) if target == "sm_80" else descriptors()]


@pytest.mark.parametrize("target", TARGETS)
def test_a_sound_matmul_has_no_fault(target: str):
    for report in (compile_for(build, TARGETS[target]) for build in sound(target)):
        assert report.faults() == []
        assert 32 <= report.registers <= TARGETS[target].registers
        assert report.stack == report.local_in_loop == report.local_around == 0
        assert report.mma >= 4 and 0 < report.shared <= TARGETS[target].shared_limit
        assert (report.wide_mma > 0) == (target in ("sm_90", "sm_100"))
        assert (report.tensor_memory > 0) == (target == "sm_100")


@pytest.mark.parametrize("target", TARGETS)
def test_descriptors_are_copied_by_tma_where_there_is_one(target: str):
    by_pointer, by_descriptor = (compile_for(build, TARGETS[target]).tma for build in sound(target))
    assert by_pointer == 0 and (by_descriptor > 0) == (target in ("sm_90", "sm_100"))


@pytest.mark.parametrize("target", SPILLING)
def test_spills_in_the_main_loop_are_found(target: str):
    report = compile_for(SPILLING[target], TARGETS[target])
    assert report.faults() == [
        f"{report.local_in_loop} local-memory instructions inside the main loop",
        f"{report.stack} bytes of stack, 0 allowed",
    ]
    assert report.local_in_loop > 0 and report.stack > 0


@pytest.mark.parametrize("target", ["sm_100", "gfx942"])
def test_spills_in_any_loop_count_where_there_are_no_products(target: str):
    report = compile_for(sums(64, 512, 4 if target == "sm_100" else 2), TARGETS[target])
    assert report.mma == 0 and report.local_in_loop > 0
    assert any("inside the main loop" in fault for fault in report.faults())


def test_spills_around_the_main_loop_are_told_apart():
    report = compile_for(descriptors(matmul_persistent, 128, 256), TARGETS["sm_90"])
    assert report.local_around > 0 and report.local_in_loop == 0
    assert report.faults() == [f"{report.stack} bytes of stack, 0 allowed"]
    assert replace(report, build=replace(report.build, stack_allowance=report.stack)).faults() == []


def test_the_stack_allowance_is_no_licence_in_the_main_loop():
    build = replace(SPILLING["sm_90"], stack_allowance=1 << 20)
    (fault,) = compile_for(build, TARGETS["sm_90"]).faults()
    assert "inside the main loop" in fault


@pytest.mark.parametrize("target", TARGETS)
def test_too_much_shared_memory_is_found(target: str):
    report = compile_for(pointers(stages=4 if target == "gfx942" else 8), TARGETS[target])
    assert report.shared > TARGETS[target].shared_limit
    assert report.faults() == [f"{report.shared} bytes of shared memory, {target} has {TARGETS[target].shared_limit}"]


SASS = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDL R4, [R1] ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0 ;
        /*0030*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0 ;
        /*0050*/                   BRA.U UP0, `(.L_x_1) ;
        /*0060*/                   STL.64 [R1], R24 ;
        /*0070*/               @P1 BRA `(.L_x_0) ;
        /*0080*/                   STL [R1+0x8], R26 ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0 ;
        /*00b0*/              @!P0 BRA `(.L_x_3) ;
        /*00c0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
"""

AMDGCN = """
kernel:
\ts_load_dwordx2 s[0:1], s[2:3], 0x0
\tscratch_store_dword off, v1, s0       ; 4-byte Folded Spill
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tscratch_load_dword v1, off, s0
\tv_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
\ts_cbranch_scc1 .LBB0_3
\ts_branch .LBB0_1
.LBB0_3:
\tscratch_load_dword v1, off, s0
\ts_endpgm
"""


def test_loops_follow_the_flow_not_the_addresses():
    """A wait placed behind the end jumps back into the main loop: the stores between are not in it."""
    program = offline._sass(SASS)
    main, around = offline._main_loop(program, {at for at, i in enumerate(program.instructions) if "MMA" in i.opcode})
    assert main == {2, 3, 4, 5, 10, 11, 12} and around == {1, 6, 7}
    assert all(offline._main_loop(program, set())[0] >= part for part in (main, around, {13}))
    program = offline._amdgcn(AMDGCN)
    assert offline._main_loop(program, {3}) == ({2, 3, 4, 5}, set())


@pytest.mark.parametrize("target, name", [("sm_90", "wgmma"), ("sm_100", "tcgen05.mma")])
def test_wgmma_is_missed_only_where_it_is_wanted(target: str, name: str):
    build = pointers(64, 64, 32, dtype="fp32", warps=4)
    build = replace(build, constexprs={**build.constexprs, "IEEE": True})
    report = compile_for(build, TARGETS[target])
    assert report.mma == report.wide_mma == 0
    assert report.faults() == [f"no {name} though it is wanted: no tensor-core instruction instead"]
    assert compile_for(replace(build, wants_wgmma=False), TARGETS[target]).faults() == []


def test_the_table_has_a_line_per_report_and_says_what_failed():
    reports = [compile_for(b, TARGETS["sm_90"]) for b in (descriptors(), pointers(stages=8))]
    header, sound, bad, fault = table(reports).splitlines()
    assert sound.split()[:2] == ["matmul_tma", "sm_90"] and len(sound.split()) == len(header.split())
    assert bad.split()[:2] == ["matmul", "sm_90"]
    assert "FAILED" in fault and "shared memory" in fault


def test_compiling_leaves_the_environment_alone_and_writes_to_triton_s_cache(tmp_path: Path, monkeypatch, capfd):
    cache, work, temporary = (tmp_path / name for name in ("cache", "work", "tmp"))
    for folder in (work, temporary):
        folder.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    environment = dict(os.environ)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(cache)
        for target in TARGETS.values():
            compile_for(descriptors(), target)
            compiled = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
            compile_for(descriptors(), target)
            assert compiled and {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == compiled
    assert dict(os.environ) == environment
    assert list(work.iterdir()) == list(temporary.iterdir()) == []
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(signature={"a": "*bf16"}), "are not given"),
        (dict(constexprs={"IEEE": False, "BM": 128, "BN": 128, "BK": 64, "K": 64}), "given twice"),
        (dict(options={"num_wraps": 4}), "'num_wraps'] are unknown on sm_90"),
        (dict(divisible=("BM",)), "wanted a pointer or an integer"),
    ],
)
def test_a_build_that_does_not_fit_is_refused(change: dict, words: str):
    with pytest.raises(ValueError, match=words):
        compile_for(replace(pointers(), **change), TARGETS["sm_90"])


def test_only_plain_kernels_are_compiled():
    tuned = triton.autotune([triton.Config({})], key=[])(matmul)
    with pytest.raises(TypeError, match="Autotuner"):
        compile_for(replace(pointers(), kernel=tuned), TARGETS["sm_90"])


def test_what_does_not_compile_names_the_kernel_and_the_target():
    build = replace(pointers(), signature={**pointers().signature, "a": "*fp32"})
    with pytest.raises(RuntimeError, match="matmul: does not compile for sm_90"):
        compile_for(build, TARGETS["sm_90"])


INTERPRETED = """
import triton
@triton.jit
def nothing(): pass
from tdpo_kernels.offline import TARGETS, Build, compile_for
try:
    compile_for(Build("nothing", nothing, {}), TARGETS["sm_90"])
except RuntimeError as error:
    print(error)
"""


def python(code: str, **variables: str) -> str:
    root = Path(offline.__file__).parent.parent
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_interpreter_is_refused_with_a_reason(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_for(pointers(), TARGETS["sm_90"])
    assert "TRITON_INTERPRET is set" in python(INTERPRETED)


WITHOUT_TRITON = """
import importlib.util, sys
sys.modules["triton"] = None
spec = importlib.util.spec_from_file_location("offline", "tdpo_kernels/offline.py")
sys.modules["offline"] = offline = importlib.util.module_from_spec(spec)
spec.loader.exec_module(offline)
print(offline.unavailable(), "torch" in sys.modules)
"""


def test_the_module_needs_neither_triton_nor_torch():
    said = python(WITHOUT_TRITON)
    assert said.startswith("triton cannot be imported") and said.endswith("False\n")
