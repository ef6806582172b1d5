"""Check what only a GPU can break: the memory formula at large T, offsets beyond 2^31, the same bits every time; and,
when asked for, the law tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tdpo_kernels import token_stats

from .. import memory as memories
from ..gate import LIMITS, relative
from ..problem import make_problem
from ..providers import BUDGETS
from ..shapes import Shape
from .campaign import ROOT, Facts, Finding, Item, Settings

BACKENDS = ("tiled", "fused")
WORKSPACE = {"cpu": 64 * 10**6, "cuda": 2**28}  # bytes beside the budget, by the design's formula
TIMES, COMPILES = 5, 3  # calls that are compared; kernels of a backend at first use
NAMES = ("logp", "ref_logp", "kl", "dh", "dW")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # packed: hidden, weight, ref_hidden, ref_weight, labels
Evaluate = Callable[[], list[Tensor]]


def packed(settings: Settings, T: int, V: int, D: int, dtype: str = "bfloat16") -> Inputs:
    """Return random inputs; in a dry run small ones, in fp32."""
    T, V, D, dtype = (16, 203, 16, "float32") if settings.dry else (T, V, D, dtype)
    p = make_problem(Shape("packed", T, V, D, "", (), 1), dtype, settings.device)
    hidden, ref_hidden = (x.detach().flatten(0, 1) for x in (p.hidden, p.ref_hidden))
    return hidden.requires_grad_(), p.weight, ref_hidden, p.ref_weight, p.labels.flatten()


def cotangents(inputs: Inputs) -> Tensor:
    """Return ``(2, T)``, independent of each other, so that no product is spared."""
    device = inputs[4].device
    return torch.randn(2, len(inputs[4]), generator=torch.Generator(device).manual_seed(1), device=device)


def evaluate(inputs: Inputs, g: Tensor, backend: str, budget: int) -> list[Tensor]:
    """Return statistics and gradients (`NAMES`) of a call that reads nothing back to the host."""
    out = token_stats(*inputs, shift=False, ignore_index=None, backend=backend, memory_budget=budget)
    gradients = torch.autograd.grad([out.logp, out.kl], inputs[:2], list(g.to(out.kl.dtype)))
    return [out.logp.detach(), out.ref_logp, out.kl.detach(), *gradients]


def memory(settings: Settings) -> list[Item]:
    """Hold the peak above inputs, outputs and gradients to the design's formula, as T grows."""
    return [
        Item(f"{backend} T={T} {kept} kept{'' if trainable else ', frozen head'}",
             partial(_peak, settings, backend, T, kept, trainable), 3.0 + T / 2**14, COMPILES, backend)
        for T in ((16, 64) if settings.dry else (16384, 131072))
        for kept, trainable in (("0", True), ("1GiB", True), ("0", False))
        for backend in BACKENDS
    ]  # fmt: skip


def _peak(settings: Settings, backend: str, T: int, kept: str, trainable: bool) -> Facts:
    V, D, dtype = (203, 16, "float32") if settings.dry else (128256, 4096, "bfloat16")
    problem = make_problem(Shape("memory", T, V, D, "", (), 1, trainable=trainable), dtype, settings.device)
    found = memories.step_peak(problem, f"{backend}@{kept}", settings.device)
    once = 4 * D * min(T, V) if trainable else problem.hidden.nbytes  # dW summed in fp32; directions instead of logits
    allowed = BUDGETS[kept] + WORKSPACE[settings.device.type] + once
    facts = {"peak": found, "allowed": allowed, "one fp32 [T, V]": 4 * T * V}
    if found > allowed:
        raise Finding("failed", f"{found / 2**20:.0f} MiB, {allowed / 2**20:.0f} allowed", facts)
    return facts


def offsets(settings: Settings) -> list[Item]:
    """Compare sampled rows and columns where logits have more than 2^31 elements."""
    return [
        Item(f"{backend}, {kept} kept", partial(_offsets, settings, backend, kept), 10.0, COMPILES, backend=backend)
        for kept in ("all", "0")
        for backend in BACKENDS
    ]


def _offsets(settings: Settings, backend: str, kept: str) -> Facts:
    """Only the sampled rows have cotangents, so that all of dW is theirs: a float64 call on them is the truth."""
    inputs = hidden, weight, ref_hidden, ref_weight, labels = packed(settings, 20000, 131072, 64)
    rows, columns = (torch.linspace(0, n - 1, min(n, 257), device=hidden.device).long() for n in map(len, inputs[:2]))
    g = torch.zeros(2, len(hidden), device=hidden.device).index_copy_(1, rows, cotangents(inputs)[:, rows])
    found = evaluate(inputs, g, backend, BUDGETS[kept])
    leaves = [x.detach().double().requires_grad_() for x in (hidden[rows], weight)]
    exact = evaluate((*leaves, ref_hidden[rows].double(), ref_weight.double(), labels[rows]), g[:, rows], "naive", 0)
    pairs = [(x[rows], y) for x, y in zip(found[:4], exact, strict=False)] + [(found[4][columns], exact[4][columns])]
    facts = {name: relative(x, y) for name, (x, y) in zip(NAMES, pairs, strict=True)}
    if bad := [name for name, error in facts.items() if not error <= LIMITS["bfloat16"]]:
        raise Finding("failed", f"off: {', '.join(bad)}", facts)
    return facts


def determinism(settings: Settings) -> list[Item]:
    """Compare bits: again, in another thread, on a side stream, and replayed from a graph."""
    return [
        Item(f"{backend} {dtype}", partial(_same_bits, settings, backend, dtype), 5.0, COMPILES, backend=backend)
        for dtype in (("float32",) if settings.dry else ("bfloat16", "float32"))
        for backend in BACKENDS
    ]


def _same_bits(settings: Settings, backend: str, dtype: str) -> Facts:
    """Half of the logits are kept."""
    inputs = packed(settings, 1000, 20011, 256, dtype)
    call = partial(evaluate, inputs, cotangents(inputs), backend, 4 * len(inputs[0]) * len(inputs[1]))
    kinds = {f"{TIMES} times": _again, "another thread": _thread}
    kinds |= {} if settings.dry else {"side stream": _stream, "graph replay": _graph}
    facts = {kind: differing(repeat(call), call()) or "same bits" for kind, repeat in kinds.items()}
    if bad := [f"{kind}: {said}" for kind, said in facts.items() if said != "same bits"]:
        raise Finding("failed", "; ".join(bad), facts)
    return facts


def differing(found: list[list[Tensor]], wanted: list[Tensor]) -> str:
    """Return the names of what has other bits."""
    apart = [[(x.contiguous().view(torch.uint8) != y.contiguous().view(torch.uint8)).any() for x, y in pairs]
             for pairs in (zip(some, wanted, strict=True) for some in found)]  # fmt: skip
    bad = [name for name, flags in zip(NAMES, zip(*apart, strict=True), strict=True) if any(flags)]
    return f"other bits in {', '.join(bad)}" if bad else ""


def _again(call: Evaluate) -> list[list[Tensor]]:
    return [call() for _ in range(TIMES)]


def _thread(call: Evaluate) -> list[list[Tensor]]:
    """Call in a thread that knows nothing of this one; on CUDA autograd's own is a third."""
    return [ThreadPoolExecutor(1).submit(call).result()]


def _stream(call: Evaluate) -> list[list[Tensor]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = _again(call)
    torch.cuda.synchronize()
    return found


def _graph(call: Evaluate) -> list[list[Tensor]]:
    """Capture after a warm-up, and replay into what was filled with NaN."""
    found, captured = _stream(call), torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = call()
    for x in out:
        x.fill_(float("nan"))
    captured.replay()
    torch.cuda.synchronize()
    return [*found, out]


def laws(settings: Settings) -> list[Item]:
    """Run pytest's tests of the mark `gpu`, a file at a time."""
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    return [Item(path.name, partial(_laws, path), 60.0, 20, limit=400.0) for path in files]


def _laws(path: Path) -> Facts:
    command = ["-m", "pytest", "-q", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-20000:], done.stderr[-5000:], file=sys.stderr)
    last = ((done.stdout or done.stderr).strip().splitlines() or ["no output"])[-1]
    if done.returncode not in (0, 5):  # 5: none of the mark was selected
        status = "skipped" if "No module named" in last else "failed"
        raise Finding(status, f"pytest exits with {done.returncode}: {last}")
    return {"pytest": last}
