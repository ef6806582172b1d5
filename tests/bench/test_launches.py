"""Hold which binaries launches ask for, by Triton's own specialisation: no kernel runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from test_compiled import KERNELS

from bench.compiled.binary import TARGETS, Build, unavailable
from bench.compiled.jobs import Job, build_of
from tdpo_kernels import LMHead
from tdpo_kernels.backends import BACKENDS, grid, kerneltiles, launch, logits, rowmath, selfcheck
from tdpo_kernels.backends.kerneltiles import FUSED_TILE
from tdpo_kernels.engine import inputs_of
from tdpo_kernels.tuning import Case, Device
from tdpo_kernels.types import Model, Needs, Rows, Workspace

if reason := unavailable():
    pytest.skip(reason, allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature


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
