"""Measure accuracy as the policy drifts away from the reference, from 1e-8 nats per token, where runs start, to 10.

The KL and its gradient are held against the formula in float64 on the same numbers. The drift lies in a few features of
the hidden states, with opposite signs in the two models, so that rounding the inputs to 16 bits leaves a drift of any
size what it was.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from .gate import relative
from .problem import Problem, make_problem
from .providers import PROVIDERS, eager
from .shapes import Shape

FEATURES = 16  # that drift


def errors(shape: Shape, dtype: str, name: str, device: torch.device) -> dict:
    """Return the relative errors of a provider's KL and of that KL's gradient, and the drift, as facts of a row."""
    problem, wanted, drift = _truth(shape, dtype, device)
    problem.clear()
    kl_S = PROVIDERS[name].kl(problem)
    kl_S.sum().backward()
    found = {"kl": kl_S.detach(), **problem.gradients()}
    off = {what: relative(found[what], value) for what, value in wanted.items()}
    facts = {"drift": drift, "kl_error": off.pop("kl"), "error": max(off.values())}
    return facts if math.isfinite(facts["kl_error"] + facts["error"]) else {"red": True, "note": "not finite"}


@lru_cache(maxsize=1)
def _truth(shape: Shape, dtype: str, device: torch.device) -> tuple[Problem, dict[str, Tensor], float]:
    problem = drifted(shape, dtype, device)
    exact = problem.double()
    kl_S = eager.kl(exact)
    kl_S.sum().backward()
    return problem, {"kl": kl_S.detach(), **exact.gradients()}, mean_kl(problem)


def drifted(shape: Shape, dtype: str, device: torch.device | str = "cpu") -> Problem:
    """Return a problem whose mean KL per token is as near to the target as the inputs' dtype permits."""
    base = make_problem(replace(shape, one_head=True), "float64", device)
    low, high = -12.0, 4.0  # powers of ten
    for _ in range(40):
        middle = (low + high) / 2
        below = mean_kl(_apart(base, 10**middle, "float64")) < shape.drift
        low, high = (middle, high) if below else (low, middle)
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
