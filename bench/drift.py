"""Accuracy as the policy drifts away from the reference, from 1e-8 nats per token, where every run starts, to 10.

The KL and its gradient of everybody who computes one, against the formula in float64 on the same numbers. The drift
lies in a few features of the hidden states, with opposite signs in the two models, so that rounding the inputs to 16
bits leaves a drift of any size what it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from .conditions import Conditions
from .gate import relative
from .problem import Problem, make_problem
from .providers import PROVIDERS, Provider, eager
from .rows import Row
from .run import row
from .shapes import Shape

TARGETS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 3.0, 10.0)
QUICK = (1e-8, 1e-3, 1.0)
DTYPES = ("float32", "bfloat16")
WHO = ("eager", "compiled", "trl", "liger", "ours@all", "ours@0")
SHAPE = Shape("drift", 64, 4099, 128, "accuracy against drift", WHO, 1, DTYPES)
FEATURES = 16  # that drift
HALVINGS = 40


def study(
    dtype: str,
    names: Iterable[str],
    targets: Iterable[float],
    conditions: Conditions,
    tick: Callable[[int], None],
    device: torch.device,
) -> list[Row]:
    """A row per target and provider; `tick` is told of each. One row, with the reason, for who cannot run."""
    names, targets, same = list(names), list(targets), dict(dtype=dtype, rounds=1, conditions=conditions)
    missing = absent(names, device)
    rows = [row(SHAPE, name, note=f"skipped: {why}", **same) for name, why in missing.items()]
    tick(len(missing))
    for target in targets:
        problem = drifted(target, dtype, device)
        truth, drift = problem.double(), _mean_kl(problem)
        kl_S = eager.kl(truth)
        kl_S.sum().backward()
        shape = replace(SHAPE, name=name_of(target))
        for name in (n for n in names if n not in missing):
            rows.append(row(shape, name, drift=drift, **_errors(PROVIDERS[name], problem, truth, kl_S), **same))
            tick(1)
    return rows


def absent(names: Iterable[str], device: torch.device) -> dict[str, str]:
    """Who cannot run there, and why not."""
    return {name: why for name in names if (why := PROVIDERS[name].unavailable(SHAPE, device))}


def name_of(target: float) -> str:
    return f"drift-{target:.0e}"


def drifted(target: float, dtype: str, device: torch.device | str = "cpu") -> Problem:
    """A mean KL per token as near to the target as the inputs' dtype permits."""
    base = make_problem(replace(SHAPE, one_head=True), "float64", device)
    low, high = -12.0, 4.0  # powers of ten
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _mean_kl(_apart(base, 10**middle, "float64")) < target else (low, middle)
    return _apart(base, 10**low, dtype)


def _apart(base: Problem, distance: float, dtype: str) -> Problem:
    noise = distance * (base.ref_hidden - base.hidden.detach())[..., -FEATURES:] / 0.1

    def side(sign: float) -> torch.Tensor:
        hidden = base.hidden.detach().clone()
        hidden[..., -FEATURES:] = sign * noise
        return hidden.to(getattr(torch, dtype))

    weight = base.weight.detach().to(getattr(torch, dtype))
    return replace(base, hidden=side(-1).requires_grad_(), weight=weight.clone().requires_grad_(),
                   ref_hidden=side(1), ref_weight=weight)  # fmt: skip


def _mean_kl(problem: Problem) -> float:
    with torch.no_grad():
        return float(eager.kl(problem.double()).sum()) / problem.labels.numel()


def _errors(provider: Provider, problem: Problem, truth: Problem, kl_S: torch.Tensor) -> dict:
    problem.clear()
    try:
        out = provider.kl(problem)
        out.sum().backward()
    except Exception as error:  # a finding about this one, not the end of the others
        return {"red": True, "note": f"{type(error).__name__}: {error}".splitlines()[0]}
    wanted = truth.gradients()
    kl_error = relative(out.detach(), kl_S.detach())
    error = max(relative(g, wanted[name]) for name, g in problem.gradients().items())
    if not math.isfinite(kl_error + error):
        return {"red": True, "note": "not finite"}
    return {"kl_error": kl_error, "error": error}
