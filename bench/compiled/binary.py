"""Compile one kernel for one target and read the binary: no GPU and no driver, files in Triton's cache only.

Triton's wheel carries the `cuobjdump` and `nvdisasm` that NVIDIA's binaries are read with.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from triton.compiler import ASTSource, CompiledKernel

KIB = 1024
STACK = 16  # bytes a thread that may be spilled
MMA = r"([HIDBQO]MMA|[HIQB]GMMA|UTC[HIQO]MMA)\b|v_s?mfmac?_"
BULK_COPY = r"(UTMALDG|UTMASTG|UTMAREDG|UBLKCP|UBLKRED)\b"


@dataclass(frozen=True)
class Target:
    """A device to compile for. `shared` is the bytes and `tensor_memory` the columns that a block can ask for; `wide`
    matches the tensor-core instructions of whole warpgroups, where it has some."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared: int
    tensor_memory: int = 0
    wide: str = ""


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * KIB),
        Target("sm_86", "cuda", 86, 32, 99 * KIB),
        Target("sm_89", "cuda", 89, 32, 99 * KIB),
        Target("sm_90", "cuda", 90, 32, 227 * KIB, wide=r"[HIQB]GMMA\b"),
        Target("sm_100", "cuda", 100, 32, 227 * KIB, 512, wide=r"UTC[HIQO]MMA\b"),
        Target("sm_120", "cuda", 120, 32, 99 * KIB),
        Target("gfx942", "hip", "gfx942", 64, 64 * KIB),
    )
}


class Build(NamedTuple):
    """One kernel, specialised as a launch would: its source with the types and constants of its arguments, and options.
    `wide` says that its products are meant for warpgroup instructions, where the target has some."""

    name: str
    source: ASTSource
    options: dict[str, Any]
    wide: bool = False


@dataclass(frozen=True)
class Report:
    """Hold the outcome. Registers (with AMD's for accumulation) and bytes of stack are a thread's, bytes of shared and
    columns of tensor memory a block's; `mma`, `wide` and `tma` count instructions of the binary, not executions."""

    registers: int = 0
    stack: int = 0
    shared: int = 0
    tensor_memory: int = 0
    mma: int = 0
    wide: int = 0
    tma: int = 0
    seconds: float = 0.0
    faults: tuple[str, ...] = ()


def unavailable() -> str:
    """Return why nothing can be compiled here, or an empty string."""
    try:
        import triton
        import triton.language as tl
        from triton.runtime.jit import JITFunction
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if triton.knobs.runtime.interpret or not isinstance(tl.sum, JITFunction):
        return "TRITON_INTERPRET is set, or was when triton was imported: kernels are interpreted, not compiled"
    return ""


def compiled(build: Build, target: Target) -> CompiledKernel:
    """Return what Triton makes of the build, or raise RuntimeError that names the kernel and the target."""
    import triton
    from triton.backends.compiler import GPUTarget

    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    try:
        return triton.compile(build.source, target=gpu, options=build.options)
    except Exception as error:
        raise RuntimeError(f"{build.name}: does not compile for {target.name}: {error}") from error


def report(build: Build, target: Target) -> Report:
    """Return what the build compiles to for `target`, its faults included."""
    start = time.perf_counter()
    try:
        kernel = compiled(build, target)
    except RuntimeError as error:
        return Report(faults=(" ".join(str(error).split()),))
    seconds = time.perf_counter() - start
    registers, stack, opcodes = (_read_cuda if target.backend == "cuda" else _read_hip)(kernel)
    shared, tensor_memory = kernel.metadata.shared, getattr(kernel.metadata, "tmem_size", None) or 0
    patterns = MMA, target.wide or "$", BULK_COPY
    counts = (sum(bool(re.match(pattern, opcode)) for opcode in opcodes) for pattern in patterns)
    out = Report(registers, stack, shared, tensor_memory, *counts, seconds)
    return replace(out, faults=(*_faults(build, target, out),))


def _faults(build: Build, target: Target, out: Report) -> Iterator[str]:
    if out.stack > STACK:
        yield f"{out.stack} bytes of stack, {STACK} allowed"
    if out.shared > target.shared:
        yield f"{out.shared} bytes of shared memory, {target.name} has {target.shared}"
    if out.tensor_memory > target.tensor_memory:
        yield f"{out.tensor_memory} columns of tensor memory, {target.name} has {target.tensor_memory}"
    if build.wide and target.wide and not out.wide:
        yield f"no product of a whole warpgroup though it is wanted: {out.mma} narrower ones instead"


def _read_cuda(kernel: CompiledKernel) -> tuple[int, int, list[str]]:
    """Return registers, bytes of stack, and the instructions' names."""
    path = next(path for name, path in kernel.metadata_group.items() if name.endswith(".cubin"))
    found = re.search(r"Function \S+:\s*REG:(\d+) STACK:(\d+)", _run("cuobjdump", "--dump-resource-usage", path))
    line = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)"
    return int(found[1]), int(found[2]), re.findall(line, _run("nvdisasm", "-c", path), re.M)


def _read_hip(kernel: CompiledKernel) -> tuple[int, int, list[str]]:
    text, keys = kernel.asm["amdgcn"], ("vgpr_count", "private_segment_fixed_size")
    registers, stack = (int(re.search(rf"^\s+\.{key}:\s+(\d+)", text, re.M)[1]) for key in keys)
    return registers, stack, re.findall(r"^\s+([a-z]\w*)", text, re.M)


def _run(tool: str, *arguments: str) -> str:
    import triton

    command = [getattr(triton.knobs.nvidia, tool).path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
