"""Compare every available backend with float64, beside plain torch on the same inputs in the same dtype.

The bound is scale-free: ``error <= 2 * plain + 4 * eps``, errors relative to the truth's norm. For float64, whose
truth is rounded as well, it is ``2 * plain + 16 * eps``. Where plain torch makes a nan or an inf of a finite truth,
its error counts as 30 eps, so that no nan passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import BACKENDS, availability, lacks
from .op import token_stats
from .reference import logits, statistics
from .types import LMHead

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = ("logp", "ref_logp", "kl", "dh", "dW", "db")
UNUSABLE = 30.0  # eps x scale: the error that plain torch counts as having where it is not finite
BUDGETS = {"0": 0, "2 MB": 2 * 10**6, "all": 2**40}


@dataclass(frozen=True, eq=False)
class Problem:
    """Hold one hard case: both models' hidden states and heads, labels, and independent cotangents per token."""

    name: str
    hidden: Tensor
    head: LMHead
    ref_hidden: Tensor
    ref_head: LMHead
    labels: Tensor
    g_logp: Tensor
    g_kl: Tensor

    def to(self, dtype: torch.dtype) -> Problem:
        heads = {
            name: replace(x, weight=x.weight.to(dtype), bias=None if x.bias is None else x.bias.to(dtype))
            for name, x in (("head", self.head), ("ref_head", self.ref_head))
        }
        return replace(self, hidden=self.hidden.to(dtype), ref_hidden=self.ref_hidden.to(dtype), **heads)

    @cached_property
    def logits(self) -> list[Tensor]:
        """Return both models' logits in float64."""
        sides = (self.hidden, self.head), (self.ref_hidden, self.ref_head)
        return [logits(hidden, head, torch.float64) for hidden, head in sides]


def problems(device: torch.device) -> Iterator[Problem]:
    """Yield small, hard cases: ragged tiles, peaked rows, near-equal models, offsets, ruled-out tokens, a softcap."""
    yield _problem("flat", device)
    yield _problem("ragged V, D != E", device, V=4099, E=40)
    yield _problem("peaked", device, spread=10.0)
    yield _problem("near-equal", device, apart=1e-4)
    yield _problem("offset 50", device, apart=1e-2, offset=50.0)
    yield _problem("-inf in both", device, ruled_out=0.2)
    yield _problem("softcap", device, spread=4.0, bias=True, logit_scale=1.5, softcap=5.0)
    yield _problem("one token", device, T=1)


def _problem(
    name: str, device: torch.device, *, T: int = 96, V: int = 5003, D: int = 64, E: int = 64, spread: float = 1.0,
    apart: float | None = None, offset: float = 0.0, ruled_out: float = 0.0, bias: bool = False,
    logit_scale: float = 1.0, softcap: float | None = None,
) -> Problem:  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    hidden, weight = normal(T, D), normal(V, D) * spread * D**-0.5
    ref_hidden, ref_weight = normal(T, E), normal(V, E) * spread * E**-0.5
    if apart is not None:
        ref_hidden, ref_weight = hidden + apart * ref_hidden, weight
    biases = (normal(V), normal(V)) if bias else (None, None)
    if offset or ruled_out:
        out = (torch.rand(V, generator=generator) < ruled_out).to(device)
        biases = tuple(torch.full_like(weight[:, 0], c).masked_fill(out, -torch.inf) for c in (0.0, offset))
    allowed = (weight[:, 0] if biases[0] is None else biases[0]).isfinite().nonzero()[:, 0]
    labels = allowed[torch.randint(len(allowed), (T,), generator=generator).to(device)]
    heads = [LMHead(w, b, logit_scale, softcap) for w, b in zip((weight, ref_weight), biases, strict=True)]
    return Problem(name, hidden, heads[0], ref_hidden, heads[1], labels, normal(T), normal(T))


Stats = Callable[[Problem], tuple[Tensor, Tensor, Tensor]]


def evaluate(problem: Problem, backend: str, memory_budget: int) -> list[Tensor]:
    """Return the statistics and gradients (`NAMES`) of one backend."""

    def stats(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
        sides = p.hidden, p.head, p.ref_hidden, p.ref_head, p.labels
        out = token_stats(*sides, shift=False, backend=backend, memory_budget=memory_budget)
        return out.logp, out.ref_logp, out.kl

    return _with_gradients(problem, stats)


def plain_torch(problem: Problem) -> list[Tensor]:
    """Return `NAMES` as a user would write them: logits in the inputs' dtype, then fp32 (float64) log-softmaxes."""

    def rounded_logits(hidden: Tensor, head: LMHead) -> Tensor:
        z = F.linear(hidden, head.weight, head.bias) * head.logit_scale
        z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def stats(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
        z, r = rounded_logits(p.hidden, p.head), rounded_logits(p.ref_hidden, p.ref_head)
        log_p, log_q = z.log_softmax(-1), r.log_softmax(-1)
        picked = (x.gather(1, p.labels[:, None])[:, 0] for x in (log_p, log_q))
        return *picked, F.kl_div(log_p, log_q, reduction="none", log_target=True).nan_to_num(0.0).sum(-1)

    return _with_gradients(problem, stats)


def truth(problem: Problem) -> list[Tensor]:
    """Return `NAMES` by the specification, `reference.py`, in float64."""
    return _with_gradients(problem.to(torch.float64), lambda p: statistics(*p.logits, p.labels))


def _with_gradients(problem: Problem, stats: Stats) -> list[Tensor]:
    parts = problem.hidden, problem.head.weight, problem.head.bias
    leaves = [x.detach().clone().requires_grad_() for x in parts if x is not None]
    head = replace(problem.head, weight=leaves[1], bias=leaves[2] if len(leaves) > 2 else None)
    logp, ref_logp, kl = stats(replace(problem, hidden=leaves[0], head=head))
    loss = (logp * problem.g_logp.to(logp.dtype)).sum() + (kl * problem.g_kl.to(kl.dtype)).sum()
    return [logp.detach(), ref_logp.detach(), kl.detach(), *torch.autograd.grad(loss, leaves)]


def relative_error(x: Tensor, exact: Tensor) -> float:
    """Return ``||x - exact|| / ||exact||``, or inf for a NaN."""
    error = (torch.linalg.vector_norm(x.double() - exact) / torch.linalg.vector_norm(exact).clamp(min=1e-300)).item()
    return error if error == error else math.inf


def _scales(problem: Problem, exact: list[Tensor]) -> list[float]:
    """Return how many times larger each result's terms are: a log-probability is a difference of larger logits."""
    scales = [1.0] * len(exact)
    for i, z in enumerate(problem.logits):
        largest = z[torch.isfinite(z)].abs().amax() * exact[i].numel() ** 0.5
        scales[i] = max(1.0, (largest / torch.linalg.vector_norm(exact[i])).item())
    return scales


@dataclass(frozen=True)
class Line:
    """Hold the worst quantity of one (backend, dtype, problem, budget): its error, plain torch's, and the bound."""

    backend: str
    dtype: str
    problem: str
    budget: str
    quantity: str
    error: float
    plain: float
    allowed: float

    @property
    def passed(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.allowed


def skipped(device: torch.device) -> dict[str, str]:
    """Return the backends that cannot run on `device`, and why."""
    return {name: why for name, why in availability(device).items() if not why.startswith("available")}


def verify(
    device: torch.device, report: Callable[[Line], None] = lambda line: None, names: Sequence[str] = (),
    dtypes: Sequence[str] = (),
) -> list[Line]:  # fmt: skip
    """Run all backends on `device`, on the problems and dtypes named (or all), and `report` each line as it comes."""
    lines, backends = [], [name for name in BACKENDS if name not in skipped(device)]
    for dtype in dtypes or DTYPES:
        for problem in (p.to(DTYPES[dtype]) for p in problems(device) if not names or p.name in names):
            exact, plain = truth(problem), plain_torch(problem)
            for backend in (b for b in backends if not lacks(b, device, DTYPES[dtype])):
                for budget, size in BUDGETS.items() if backend != "naive" else [("-", 0)]:
                    what, found = (backend, dtype, problem.name, budget), evaluate(problem, backend, size)
                    quantities = zip(NAMES, found, exact, plain, _scales(problem, exact), strict=False)
                    judged = [_judge(what, *quantity) for quantity in quantities]
                    lines.append(max(judged, key=lambda line: line.error / line.allowed))
                    report(lines[-1])
    return lines


def _judge(what: tuple[str, ...], quantity: str, found: Tensor, exact: Tensor, plain: Tensor, scale: float) -> Line:
    eps, by_plain = torch.finfo(found.dtype).eps * scale, relative_error(plain, exact)
    allowed = 2 * (by_plain if math.isfinite(by_plain) else UNUSABLE * eps)
    allowed += (16 if found.dtype == torch.float64 else 4) * eps
    return Line(*what, quantity, relative_error(found, exact), by_plain, allowed)
