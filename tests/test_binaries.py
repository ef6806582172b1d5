"""One `Launch`, one binary, and that is as the report takes it to be: or a run would compile in its middle, and launch
what never checked itself and what nobody looked through.

Triton's own specialisation, asked for without a device: no kernel runs, and no number comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from test_memory import Ledger

from tdpo_kernels import LMHead, kernels, offline, tuning
from tdpo_kernels.backends import fused, kernel_walk, launch, products, selfcheck, slab
from tdpo_kernels.backends.launch import Launch
from tdpo_kernels.backends.rowwise import Rowwise
from tdpo_kernels.kernels import Job
from tdpo_kernels.offline import TARGETS
from tdpo_kernels.tuning import Case, Device, TileConfig
from tdpo_kernels.types import Inputs, Model, Needs, Rows

if reason := offline.unavailable():
    pytest.skip(reason, allow_module_level=True)

from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

MAKERS = {"fused": fused._Fused, "tiled": Rowwise}
EVERYTHING = 2**40
Binary = tuple[
    str, frozenset[tuple[str, str]]
]  # the kernel, and of each argument its type or value and what it divides


@dataclass
class Seen:
    """What was launched on a target."""

    target: str
    binaries: dict[Launch, set[Binary]] = field(default_factory=dict)
    cases: dict[Launch, Case] = field(default_factory=dict)
    last: Binary | None = None
    case: Case | None = None

    def run(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **more: Any) -> None:
        _, specialised, _ = _binder(kernel, self.target)(*args, **more)
        self.last = kernel.fn.__name__, frozenset(map(_argument, kernel.arg_names, *zip(*specialised, strict=True)))

    def launched(self, made: Launch) -> Launch:
        self.binaries.setdefault(made, set()).add(self.last)
        self.cases[made] = self.case
        return made


@cache
def _binder(kernel: JITFunction, target: str) -> Callable:
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(TARGETS[target].gpu()))


def _argument(name: str, type_: str, what: Any) -> tuple[str, str]:
    return (
        name,
        f"{what}" if type_ == "constexpr" else f"{type_.replace(', ', ',')} {'/16' if 'D' in (what or '') else ''}",
    )


def reported(made: Launch, case: Case, target: str) -> Binary:
    """What `kernels` compiles for such a launch."""
    flags = dict(made.flags)
    if made.kernel == "merge_states":
        case = Case("merge_states", "ieee", extras=flags["EXTRAS"])
    elif torch.bfloat16 in made.dtypes:  # row kernels are chosen by their fp32 tiles
        case = replace(case, product="16bit")
    needs = flags.get("NEEDS_Z", True), flags.get("NEEDS_R", True)
    build = kernels.build_of(Job(case, made.config, TARGETS[target], needs))
    arguments = {
        name: _argument(name, type_, "D" if name in build.divisible else "") for name, type_ in build.signature.items()
    }
    arguments |= {name: _argument(name, "constexpr", value) for name, value in build.constexprs.items()}
    return build.kernel.fn.__name__, frozenset(arguments.values())


@pytest.fixture(params=("sm_80", "sm_90"))
def seen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Calls as on that target: 16-bit products, and nothing is computed."""
    it, launched = Seen(request.param), launch._launched
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **more: it.run(kernel, *args, **more))
    monkeypatch.setattr(launch, "_launched", lambda *args: it.launched(launched(*args)))
    monkeypatch.setattr(launch, "device_of", lambda _: Device("no such device", it.target))
    chosen = tuning._choose

    def choose(case: Case, *rest: Any) -> TileConfig:
        it.case = case
        return chosen(case, *rest)

    monkeypatch.setattr(tuning, "_choose", choose)
    monkeypatch.setattr(slab, "operand_dtype", lambda compute, *_: compute)
    monkeypatch.setattr(slab, "logits_", lambda out, *_: out)
    monkeypatch.setattr(products, "accumulate_", lambda *_: None)
    monkeypatch.setitem(slab.TILE, "cpu", (32, 256))
    monkeypatch.setenv(selfcheck.SWITCH, "0")
    yield it


def call(
    maker: str, T: int, V: int, budget: int, dtype: torch.dtype, *, heavy: bool, packed: bool = False, first: int = 0
):
    """A step, and its kernels' launches; hidden states begin so many elements into their memory."""

    def model(D: int) -> Model:
        head = LMHead(torch.zeros(V, D, dtype=dtype), *((torch.zeros(V, dtype=dtype), 1.0, 30.0) if heavy else ()))
        hidden = torch.zeros(2 * T * D + first, dtype=dtype)[first:].view(2 * T, D)
        return Model(hidden[: 2 * T if packed else T], head, dtype)

    rows = Rows(torch.arange(T) * 2 if packed else None, None, torch.arange(T) % V)
    inputs = Inputs(
        model(64), model(96), rows, budget, ("entropy",) if heavy else (), allocate=lambda s, d: torch.zeros(s, dtype=d)
    )
    out = kernel_walk.forward(MAKERS[maker](), inputs, Needs(True, True, heavy))
    for g_logp, g_kl in ((1, 2), (1, 0), (1, 1)):  # both models, the policy alone, the reference alone
        g = [torch.full((T,), float(x)) for x in (g_logp, g_kl)]
        kernel_walk.backward(MAKERS[maker](), inputs, Needs(True, True, heavy), out.saved, *g)


def every_call(maker: str) -> None:
    """Batches of one run: what there is of rows, and so of room for what is staged, differs."""
    for heavy, dtype in ((False, torch.bfloat16), (True, torch.bfloat16), (True, torch.float32)):
        for T in (1, 16, 33, 50, 128, 131):
            for budget in (0, 100_000, 300_000, EVERYTHING):
                call(maker, T, 1000, budget, dtype, heavy=heavy, packed=T % 2 == 0)


@pytest.mark.parametrize("maker", MAKERS)
def test_no_launch_has_two_binaries(seen: Seen, maker: str):
    every_call(maker)
    assert {made.kernel for made in seen.binaries} >= {"merge_states", "staged_dz"}
    for made, binaries in seen.binaries.items():
        assert len(binaries) == 1, f"{made}: {_differing(binaries)}"


def _differing(binaries: set[Binary]) -> str:
    arguments = [dict(arguments) for _, arguments in binaries]
    return ", ".join(
        f"{name} {sorted({a[name] for a in arguments})}"
        for name in arguments[0]
        if len({a[name] for a in arguments}) > 1
    )


@pytest.mark.parametrize("maker", MAKERS)
def test_what_is_launched_is_what_the_report_compiles(seen: Seen, maker: str):
    every_call(maker)
    for made, (binary,) in seen.binaries.items():
        other = reported(made, seen.cases[made], seen.target)
        assert binary == other, f"{made}: {_differing({binary, other})}"


@pytest.mark.parametrize("maker", MAKERS)
def test_hidden_states_that_begin_elsewhere_are_another_launch(seen: Seen, maker: str):
    """On sm_80 the configuration may be the same."""
    for first, packed in ((0, False), (1, False), (0, True), (1, True)):
        call(maker, 64, 1008, 0, torch.float32, heavy=True, packed=packed, first=first)
    for made, binaries in seen.binaries.items():
        assert len(binaries) == 1, f"{made}: {_differing(binaries)}"


@pytest.mark.parametrize("said, product", [("highest", "ieee"), ("high", "tf32")])
def test_fp32_is_multiplied_as_torch_is_told_to(seen: Seen, said: str, product: str):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(said)
    try:
        call("fused", 64, 1008, 0, torch.float32, heavy=False)
    finally:
        torch.set_float32_matmul_precision(before)
    multiplying = [made for made in seen.binaries if made.kernel in ("fused_stats", "fused_dz")]
    assert len(multiplying) == 2
    for made in multiplying:
        assert dict(made.flags)["PRECISION"] == seen.cases[made].product == product


@pytest.mark.parametrize("how", ("rounded", "stored sideways"))
@pytest.mark.parametrize("maker", MAKERS)
def test_a_weight_that_needs_a_copy_has_none_of_the_whole(seen: Seen, maker: str, how: str):
    T, V, D, dtype = 32, 2048, 64, torch.float32 if how == "rounded" else torch.bfloat16
    weight = torch.zeros(V, D, dtype=dtype) if how == "rounded" else torch.zeros(D, V, dtype=dtype).T
    model = Model(torch.zeros(T, D, dtype=dtype), LMHead(weight), torch.bfloat16)
    inputs, needs = Inputs(model, model, Rows(None, None, torch.arange(T)), 0), Needs(True, False, False)
    with Ledger() as book:
        out = kernel_walk.forward(MAKERS[maker](), inputs, needs)
        kernel_walk.backward(MAKERS[maker](), inputs, needs, out.saved, torch.ones(T), torch.full((T,), 2.0))
    assert seen.binaries and book.largest <= V * D * 2 / 4
