"""One `Launch`, one binary, whatever the batch: or a run would compile in its middle, what never checked itself.

Triton's own specialisation, asked for without a device: no kernel runs, and no number comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from tdpo_kernels import LMHead
from tdpo_kernels.backends import launch
from tdpo_kernels.backends.launch import EXTRAS, ROWS, STATE, Launch, Operands, Traits
from tdpo_kernels.tuning import Device

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("kernels are interpreted in this process, not compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

D, E, V, APART = 64, 96, 1000, 1008


@cache
def _binder(kernel: JITFunction, arch: int) -> Callable:
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", arch, 32)))


@pytest.fixture(params=(80, 90))
def binaries(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[Launch, set]:
    """What was launched on that architecture: of each argument its type or value, and whether 16 divides it."""
    seen: dict[Launch, set] = {}
    last, launched = [], launch._launched

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **more: Any) -> None:
        _, specialised, _ = _binder(kernel, request.param)(*args, **more)
        last[:] = [(kernel.fn.__name__, *zip(kernel.arg_names, map(str, specialised), strict=True))]

    def note(*args: Any) -> Launch:
        made = launched(*args)
        seen.setdefault(made, set()).add(last[0])
        return made

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(launch, "_launched", note)
    monkeypatch.setattr(launch, "device_of", lambda _: Device("no such device", f"sm_{request.param}"))
    return seen


def every_kernel(T: int, first: int, dtype: torch.dtype, heavy: bool, one_head: bool, begins: int = 0) -> None:
    """A block of T rows, from row `first` of the call's on, and columns [512, V). Hidden states begin so many elements
    into their memory."""
    more = (torch.zeros(V, dtype=dtype), 1.0, 30.0) if heavy else ()
    heads = [LMHead(torch.zeros(V, width, dtype=dtype), *more) for width in (D, D if one_head else E)]
    heads = [heads[0], heads[0]] if one_head else heads
    hidden = [torch.zeros(begins + T * h.weight.shape[1], dtype=dtype)[begins:].view(T, -1) for h in heads]
    cols, rows, total = slice(512, V), slice(first, first + T), first + T + 3
    t = launch.traits_of(heads, (dtype, dtype), heavy, torch.device("cpu"), all(map(launch.aligned, hidden)))
    known = [launch.head_of(h, None if h.bias is None else h.bias[cols]) for h in heads]
    sides = [Operands(x, h.weight[cols], k) for x, h, k in zip(hidden, heads, known, strict=True)]
    labels, values = torch.zeros(total, dtype=torch.int64)[rows], torch.zeros(ROWS, total)[:, rows]
    pair = torch.zeros(2, T, APART)[:, :, : V - 512]
    launches(t, sides, pair, labels, values, torch.zeros(2, total)[:, rows], dtype)


def launches(t: Traits, sides, pair, labels, values, logits, dtype) -> None:
    (_, T, C), height, known = pair.shape, STATE + EXTRAS * t.case.extras, [side.head for side in sides]
    parts = -(-C // t.config("fused_stats").C)
    states, dz = torch.zeros(1 + parts, height, T)[1:], torch.zeros(T, APART, dtype=dtype)[:, :C]
    for kept in (None, pair):
        launch.fused_stats(t, *sides, labels, 512, states, logits, kept)
    launch.fused_dz(t, *sides, labels, 512, values, dz)
    launch.tile_stats(t, pair, known, labels, 512, states[:1], logits)
    for tiles in (pair, (pair[0], None), (None, pair[1])):
        launch.tile_dz(t, tiles, known, labels, 512, values, dz)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize(("heavy", "one_head"), ((False, False), (True, False), (False, True)))
def test_no_batch_compiles_anew(binaries: dict, dtype: torch.dtype, heavy: bool, one_head: bool):
    for T, first in ((1, 0), (16, 0), (33, 16), (50, 7), (128, 128), (131, 1)):
        every_kernel(T, first, dtype, heavy, one_head)
    assert len(binaries) == 7
    for made, several in binaries.items():
        assert len(several) == 1, f"{made}: {_differing(several)}"


def test_hidden_states_that_begin_elsewhere_are_another_launch(binaries: dict):
    for begins in (0, 1, 8):
        every_kernel(64, 0, torch.float32, True, False, begins)
    for made, several in binaries.items():
        assert len(several) == 1, f"{made}: {_differing(several)}"


def _differing(several: set) -> str:
    one, other, *_ = several
    return str([(a, b) for a, b in zip(one, other, strict=True) if a != b])
