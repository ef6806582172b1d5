"""Measure accuracy as the policy drifts away from the reference, from 1e-8 nats per token, where runs start, to 10.

The KL and its gradient of everybody who computes one are held against the formula in float64 on the same numbers. The
drift lies in a few features of the hidden states, with opposite signs in the two models, so that rounding the inputs to
16 bits leaves a drift of any size what it was.
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


def study(
    dtype: str, names: list[str], targets: Iterable[float], conditions: Conditions, tick: Callable, device: torch.device
) -> list[Row]:
    """Return a row per target and provider, and one with the reason for who cannot run. `tick` is told of each."""
    same, missing = dict(dtype=dtype, rounds=1, conditions=conditions), absent(names, device)
    rows = [row(SHAPE, name, note=f"skipped: {why}", **same) for name, why in missing.items()]
    tick(len(missing))
    for target in targets:
        problem = drifted(target, dtype, device)
        truth, drift = problem.double(), mean_kl(problem)
        kl_S = eager.kl(truth)
        kl_S.sum().backward()
        shape = replace(SHAPE, name=name_of(target))
        for name in (n for n in names if n not in missing):
            rows.append(row(shape, name, drift=drift, **_errors(PROVIDERS[name], problem, truth, kl_S), **same))
            tick(1)
    return rows


def absent(names: Iterable[str], device: torch.device) -> dict[str, str]:
    """Return who cannot run there, and why not."""
    return {name: why for name in names if (why := PROVIDERS[name].unavailable(SHAPE, device))}


def name_of(target: float) -> str:
    return f"drift-{target:.0e}"


def drifted(target: float, dtype: str, device: torch.device | str = "cpu") -> Problem:
    """Return a problem whose mean KL per token is as near to the target as the inputs' dtype permits."""
    base = make_problem(replace(SHAPE, one_head=True), "float64", device)
    low, high = -12.0, 4.0  # powers of ten
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_kl(_apart(base, 10**middle, "float64")) < target else (low, middle)
    return _apart(base, 10**low, dtype)


def _apart(base: Problem, distance: float, dtype: str) -> Problem:
    noise = distance * (base.ref_hidden - base.hidden.detach())[..., -FEATURES:] / 0.1
    policy, reference = (base.hidden.detach().clone() for _ in range(2))
    policy[..., -FEATURES:], reference[..., -FEATURES:] = -noise, noise
    hidden, ref_hidden, weight = (x.to(getattr(torch, dtype)) for x in (policy, reference, base.weight.detach()))
    leaves = dict(hidden=hidden.requires_grad_(), weight=weight.clone().requires_grad_())
    return replace(base, ref_hidden=ref_hidden, ref_weight=weight, **leaves)


def mean_kl(problem: Problem) -> float:
    with torch.no_grad():
        return float(eager.kl(problem.double()).sum()) / problem.labels.numel()


def _errors(provider: Provider, problem: Problem, truth: Problem, kl_S: torch.Tensor) -> dict:
    problem.clear()
    try:
        out = provider.kl(problem)
        out.sum().backward()
    except Exception as error:  # a finding about this one, not the end of the others
        return {"red": True, "note": f"{type(error).__name__}: {error}".splitlines()[0]}
    kl_error, wanted = relative(out.detach(), kl_S.detach()), truth.gradients()
    error = max(relative(g, wanted[name]) for name, g in problem.gradients().items())
    finite = math.isfinite(kl_error + error)
    return {"kl_error": kl_error, "error": error} if finite else {"red": True, "note": "not finite"}
