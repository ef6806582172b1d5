"""Check before anything is timed: every provider first answers a small cut of the shape, against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .problem import Problem, Step, make_problem
from .providers import Provider
from .providers.eager import dpo, tdpo2, tensors
from .shapes import Shape

LIMITS = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 1e-2}
ROWS, COLUMNS = 128, 5003  # few enough for float64, enough for several tiles and a ragged one


@dataclass(frozen=True)
class Verdict:
    """`error` is the largest of the loss's and each gradient's, relative to its norm."""

    error: float
    complaint: str | None = None


def check(provider: Provider, shape: Shape, dtype: str, device: torch.device | str = "cpu") -> Verdict:
    """Hold a provider to the truth of what it computes, in whole or in part. What it raises is the caller's to note."""
    cut = shape if provider.like else replace(shape, T=min(shape.T, ROWS), V=min(shape.V, COLUMNS))
    problem = make_problem(cut, dtype, device)
    wanted = _truth(provider, problem)
    loss = answer(problem.step(provider.make), problem)
    errors = {name: relative(x, wanted[name]) for name, x in {"loss": loss, **problem.gradients()}.items()}
    worst = max(errors, key=errors.__getitem__)
    bad = not errors[worst] <= LIMITS[dtype]
    return Verdict(errors[worst], f"{worst} is off by {errors[worst]:.1e}, limit {LIMITS[dtype]:.0e}" if bad else None)


def _truth(provider: Provider, problem: Problem) -> dict[str, Tensor]:
    """Return loss and gradients in float64, or those of the provider that stands for the truth."""
    if provider.like:
        loss = answer(problem.step(provider.like.make), problem)
        return {"loss": loss, **{name: x.clone() for name, x in problem.gradients().items()}}
    exact = problem.double()
    loss = dpo(exact) if provider.partial else tdpo2(*tensors(exact))
    if loss.requires_grad:
        loss.backward()
    return {"loss": loss.detach(), **exact.gradients()}


def answer(step: Step, problem: Problem) -> Tensor:
    """Return one step's loss, and leave its gradients on the problem."""
    problem.clear()
    loss = step.forward()
    step.backward(loss)
    return loss.detach()


def relative(x: Tensor | None, truth: Tensor) -> float:
    """Return the relative error, infinite for a gradient that is missing or not a number."""
    error = math.inf if x is None else float((x.double() - truth.double()).norm() / truth.double().norm())
    return error if math.isfinite(error) else math.inf
