"""What a Triton kernel compiles to, with no GPU and no driver: registers, stack, shared memory, tensor-core and TMA
instructions, and local-memory traffic in its loops.

Everything is read off the binary that a launch would load. Files are written to Triton's cache only, which also makes
the second run quick; `triton` itself is imported when something is compiled.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

KIB = 1024


@dataclass(frozen=True)
class Target:
    """A device to compile for. `wide_mma` matches the tensor-core instructions of whole warpgroups, if it has any."""

    name: str
    backend: str  # "cuda" | "hip"
    arch: int | str
    warp_size: int
    shared_limit: int  # bytes a block can ask for
    registers: int  # vector registers a thread can have
    wide_mma: str = ""
    tensor_memory_limit: int = 0  # columns a block can ask for

    def gpu(self) -> GPUTarget:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, self.warp_size)


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * KIB, 255),
        Target("sm_90", "cuda", 90, 32, 227 * KIB, 255, wide_mma=r"[HIQB]GMMA\b"),
        Target("sm_100", "cuda", 100, 32, 227 * KIB, 255, wide_mma=r"UTC[HIQO]MMA\b", tensor_memory_limit=512),
        Target("gfx942", "hip", "gfx942", 64, 64 * KIB, 512),
    )
}


@dataclass(frozen=True)
class Build:
    """One kernel at one configuration, as a launch would specialise it.

    Args:
        signature: the type of every argument that is no constexpr: ``"*bf16"``, ``"i32"``, ``"fp32"``, or for a host
            `TensorDescriptor` ``"tensordesc<bf16[128, 64]>"`` with its block shape.
        constexprs: the other arguments; also those a launch passes as None, and integers equal to 1.
        options: launch options (num_warps, num_stages, ...). One that the target does not know raises.
        divisible: arguments that are divisible by 16: pointers in bytes, integers in value.
        stack_allowance: bytes of stack that are no fault; there are none for local memory in the main loop.
        wants_wgmma: whether the products are meant for warpgroup instructions: wgmma on sm_90, tcgen05 on sm_100.
    """

    name: str
    kernel: JITFunction
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    stack_allowance: int = 0
    wants_wgmma: bool = False


@dataclass(frozen=True)
class Report:
    """What came out. Counts are of instructions in the binary, not of executions.

    The main loop is an innermost loop with tensor-core instructions; in a kernel that has no such loop, every loop is.
    """

    build: Build
    target: Target
    registers: int  # a thread's, AMD's accumulation registers included
    stack: int  # bytes a thread
    shared: int  # bytes a block
    tensor_memory: int  # columns a block, sm_100 only
    mma: int  # tensor-core instructions
    wide_mma: int  # those of whole warpgroups
    tma: int  # bulk copies between global and shared memory
    local_in_loop: int  # local-memory (AMD: scratch) instructions in a main loop
    local_around: int  # the same in the loops around it, outside of it: once per output tile in a persistent kernel
    seconds: float  # to compile, or to find in Triton's cache

    def faults(self) -> list[str]:
        """Why not to ship this, in sentences; nothing if it is sound."""
        build, target, out = self.build, self.target, []
        if self.local_in_loop:
            out.append(f"{self.local_in_loop} local-memory instructions inside the main loop")
        if self.stack > build.stack_allowance:
            out.append(f"{self.stack} bytes of stack, {build.stack_allowance} allowed")
        if self.shared > target.shared_limit:
            out.append(f"{self.shared} bytes of shared memory, {target.name} has {target.shared_limit}")
        if self.tensor_memory > target.tensor_memory_limit:
            out.append(f"{self.tensor_memory} columns of tensor memory, {target.name} has {target.tensor_memory_limit}")
        if build.wants_wgmma and target.wide_mma and not self.wide_mma:
            instead = f"{self.mma} narrower tensor-core instructions" if self.mma else "no tensor-core instruction"
            name = "wgmma" if target.name == "sm_90" else "tcgen05.mma"
            out.append(f"no {name} though it is wanted: {instead} instead")
        return out


def unavailable(target: Target = TARGETS["sm_90"]) -> str:
    """Why nothing can be compiled for `target` here; empty if it can."""
    try:
        import triton
        import triton.language as tl
        from triton.runtime.jit import JITFunction
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if triton.knobs.runtime.interpret or not isinstance(tl.sum, JITFunction):
        return "TRITON_INTERPRET is set, or was when triton was imported: kernels are interpreted, not compiled"
    try:
        for tool in ("cuobjdump", "nvdisasm") if target.backend == "cuda" else ():
            _tool(tool)
    except RuntimeError as error:
        return str(error)
    return ""


def compile_for(build: Build, target: Target) -> Report:
    """Compiles for `target` and reads the result.

    Raises:
        RuntimeError: nothing can be compiled here (`unavailable`), or the compiler refused the kernel.
        TypeError, ValueError: the build does not fit its kernel or the target.
    """
    if reason := unavailable(target):
        raise RuntimeError(f"{build.name}: {reason}")
    compiled, seconds = _compile(build, target)
    registers, stack, program = (_read_cuda if target.backend == "cuda" else _read_hip)(compiled)
    opcodes = [line.opcode for line in program.instructions]
    mma = {at for at, opcode in enumerate(opcodes) if _MMA.match(opcode)}
    local = {at for at, opcode in enumerate(opcodes) if _LOCAL.match(opcode)}
    main, around = _main_loop(program, mma)
    return Report(
        build=build,
        target=target,
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        mma=len(mma),
        wide_mma=sum(bool(target.wide_mma and re.match(target.wide_mma, opcodes[at])) for at in mma),
        tma=sum(bool(_TMA.match(opcode)) for opcode in opcodes),
        local_in_loop=len(local & main),
        local_around=len(local & around),
        seconds=seconds,
    )


HEADER = (
    f"{'kernel':32}{'target':8}{'regs':>5}{'stack':>7}{'shared':>8}{'tmem':>6}{'mma':>5}{'wide':>5}{'tma':>5}"
    f"{'loop':>6}{'around':>8}{'s':>7}"
)


def table(reports: Iterable[Report]) -> str:
    """A line per report, its faults below it. `loop` and `around` count local-memory instructions."""
    lines = [HEADER]
    for r in reports:
        lines.append(
            f"{r.build.name:31} {r.target.name:8}{r.registers:5}{r.stack:7}{r.shared:8}{r.tensor_memory:6}{r.mma:5}"
            f"{r.wide_mma:5}{r.tma:5}{r.local_in_loop:6}{r.local_around:8}{r.seconds:7.1f}"
        )
        lines += [f"  FAILED: {fault}" for fault in r.faults()]
    return "\n".join(lines)


def _compile(build: Build, target: Target) -> tuple[CompiledKernel, float]:
    import triton
    from triton.compiler import ASTSource, make_backend

    _check(build)
    if arch := triton.knobs.runtime.override_arch:
        raise RuntimeError(f"{build.name}: TRITON_OVERRIDE_ARCH={arch} is set and would replace {target.name}")
    gpu, names = target.gpu(), build.kernel.arg_names
    known = vars(make_backend(gpu).parse_options({}))
    if unknown := sorted(build.options.keys() - known.keys()):
        raise ValueError(f"{build.name}: options {unknown} are unknown on {target.name}")
    signature = {name: "constexpr" if name in build.constexprs else build.signature[name] for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in build.divisible}
    source = ASTSource(build.kernel, signature, dict(build.constexprs), attrs)
    start = time.perf_counter()
    try:
        compiled = triton.compile(source, target=gpu, options=dict(build.options))
    except Exception as error:
        raise RuntimeError(f"{build.name}: does not compile for {target.name}: {error}") from error
    return compiled, time.perf_counter() - start


def _check(build: Build) -> None:
    from triton.runtime.jit import JITFunction

    if not isinstance(build.kernel, JITFunction):
        raise TypeError(f"{build.name}: kernel is a {type(build.kernel).__name__}, wanted a plain @triton.jit function")
    names, given = set(build.kernel.arg_names), [*build.signature, *build.constexprs]
    if set(given) != names or len(given) != len(names):
        odd = sorted(names ^ set(given)) or sorted(build.signature.keys() & build.constexprs.keys())
        raise ValueError(f"{build.name}: arguments {odd} are not given, not the kernel's, or given twice")
    for name in build.divisible:
        kind = build.signature.get(name, "constexpr")
        if not kind.startswith(("*", "i", "u")):
            raise ValueError(f"{build.name}: divisible names {name!r}, a {kind}; wanted a pointer or an integer")


class Instruction(NamedTuple):
    opcode: str
    jumps: tuple[str, ...] = ()  # the labels it may go on at
    falls: bool = True  # whether it may go on at the next one


class Program(NamedTuple):
    instructions: list[Instruction]
    labels: dict[str, int]

    def successors(self) -> list[list[int]]:
        count, labels = len(self.instructions), self.labels
        following = []
        for at, (_, jumps, falls) in enumerate(self.instructions):
            nexts = [labels[label] for label in jumps if label in labels] + [at + 1] * falls
            following.append([n for n in nexts if n < count])
        return following


_SASS_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>[^;]*)")
_SASS_LABEL = re.compile(r"(\.L_\w+):")
_SASS_JUMPS = re.compile(r"(BRA|BRXU?|JMP|JMXU?|BSSY|WARPSYNC)\b")  # calls return: they go on at the next instruction
_AMD_LINE = re.compile(r"\s+(?P<opcode>[a-z]\w*)(?P<rest>[^;]*)")
_AMD_LABEL = re.compile(r"(\.LBB\w+):")

_MMA = re.compile(r"([HIDBQO]MMA|[HIQB]GMMA|UTC[HIQO]MMA)\b|v_s?mfmac?_")
_TMA = re.compile(r"(UTMALDG|UTMASTG|UTMAREDG|UBLKCP|UBLKRED)\b")
_LOCAL = re.compile(r"(LDL|STL)\b|scratch_(load|store)_")


def _sass(text: str) -> Program:
    """What `nvdisasm -c` prints."""
    program = Program([], {})
    for line in text.splitlines():
        if label := _SASS_LABEL.match(line):
            program.labels[label[1]] = len(program.instructions)
        elif found := _SASS_LINE.match(line):
            opcode, rest = found["opcode"], found["rest"].strip()
            jumps = tuple(re.findall(r"\.L_\w+", rest)) if _SASS_JUMPS.match(opcode) else ()
            # predicates stand before the opcode, or as the first operand: `BRA.U !UP0, (.L_x_4)`
            always = not found["guard"] and (
                re.match(r"(EXIT|RET|BRXU?|JMXU?)\b", opcode) or (re.match(r"(BRA|JMP)\b", opcode) and rest[:1] == "`")
            )
            program.instructions.append(Instruction(opcode, jumps, not always))
    return program


def _amdgcn(text: str) -> Program:
    program = Program([], {})
    for line in text.splitlines():
        if label := _AMD_LABEL.match(line):
            program.labels[label[1]] = len(program.instructions)
        elif found := _AMD_LINE.match(line):
            opcode = found["opcode"]
            jumps = tuple(re.findall(r"\.LBB\w+", found["rest"])) if re.match(r"s_c?branch", opcode) else ()
            falls = opcode not in ("s_branch", "s_endpgm", "s_setpc_b64")
            program.instructions.append(Instruction(opcode, jumps, falls))
    return program


def _read_cuda(compiled: CompiledKernel) -> tuple[int, int, Program]:
    """Registers, bytes of stack, and the program."""
    path = next(path for name, path in compiled.metadata_group.items() if name.endswith(".cubin"))
    usage = _run("cuobjdump", "--dump-resource-usage", path)
    found = re.search(rf"Function {re.escape(compiled.metadata.name)}:\s*REG:(\d+) STACK:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump says nothing of {compiled.metadata.name}: {usage}")
    return int(found[1]), int(found[2]), _sass(_run("nvdisasm", "-c", path))


def _read_hip(compiled: CompiledKernel) -> tuple[int, int, Program]:
    text = compiled.asm["amdgcn"]
    registers, stack = (
        int(re.search(rf"^\s+\.{key}:\s+(\d+)", text, re.M)[1]) for key in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, stack, _amdgcn(text)


def _tool(name: str) -> str:
    """Where Triton keeps one of NVIDIA's tools; a RuntimeError names it if it does not."""
    import triton

    return getattr(triton.knobs.nvidia, name).path


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_tool(tool), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip()}")
    return done.stdout


def _main_loop(program: Program, mma: set[int]) -> tuple[set[int], set[int]]:
    """The instructions of the main loops (`Report`), and those of the loops around them."""
    successors = program.successors()
    loops = list(_loops(successors, set(range(len(successors)))))
    with_mma = [loop for loop in loops if loop & mma]
    innermost = [loop for loop in with_mma if not any(other < loop for other in with_mma)]
    main = set().union(*(innermost or loops))
    return main, set().union(*with_mma) - main


def _loops(successors: list[list[int]], among: set[int]) -> Iterator[set[int]]:
    """Every loop, the outer ones first: what can reach itself, and again within that without the way in.

    The flow decides, not the order of the addresses: ptxas puts waits on barriers behind the end of the program, and
    their jumps back into a loop would span everything between.
    """
    for part in _strongly_connected(successors, among):
        first = next(iter(part))
        if len(part) == 1 and first not in successors[first]:
            continue
        yield part
        outside = (at for at in range(len(successors)) if at not in part)
        entries = {n for at in outside for n in successors[at] if n in part}
        yield from _loops(successors, part - (entries or {min(part)}))


def _strongly_connected(successors: list[list[int]], among: set[int]) -> list[set[int]]:
    """Tarjan's algorithm, without recursion."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    pending: set[int] = set()
    parts = []
    for root in sorted(among):
        work = [(root, iter(()))] if root not in order else []
        while work:
            at, todo = work[-1]
            if at not in order:
                order[at] = low[at] = len(order)
                stack.append(at)
                pending.add(at)
                todo = iter([n for n in successors[at] if n in among])
                work[-1] = (at, todo)
            for n in todo:
                if n not in order:
                    work.append((n, iter(())))
                    break
                if n in pending:
                    low[at] = min(low[at], order[n])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[at])
                if low[at] == order[at]:
                    part = set()
                    while at not in part:
                        part.add(stack.pop())
                    pending -= part
                    parts.append(part)
    return parts
