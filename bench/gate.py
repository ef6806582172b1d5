"""Nothing wrong is timed: every provider first answers a small cut of the shape, against the formula in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .problem import Problem, make_problem
from .providers import Provider, Step
from .providers.eager import dpo, tdpo2, tensors
from .shapes import Shape

LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}
ROWS, COLUMNS = 128, 5003  # few enough for float64, enough for several tiles and a ragged one


@dataclass(frozen=True)
class Verdict:
    error: float | None  # the largest of the loss's and each gradient's error, relative to its norm
    complaint: str | None = None


def check(provider: Provider, shape: Shape, dtype: str, device: torch.device | str = "cpu") -> Verdict:
    """A partial provider is held to the truth of what it computes."""
    if provider.computes == "products":
        return Verdict(None)
    cut = replace(shape, T=min(shape.T, ROWS), V=min(shape.V, COLUMNS))
    problem = make_problem(cut, dtype, device)
    truth = problem.double()
    true_loss = dpo(truth) if provider.partial else tdpo2(*tensors(truth))
    true_loss.backward()
    try:
        loss = answer(provider.make(problem), problem)
    except Exception as error:  # a provider that cannot run is a finding, not the end of the others' measurement
        return Verdict(None, f"{type(error).__name__}: {error}".splitlines()[0])
    wanted = {"loss": true_loss.detach(), **truth.gradients()}
    errors = {name: relative(x, wanted[name]) for name, x in {"loss": loss, **problem.gradients()}.items()}
    worst = max(errors, key=errors.__getitem__)
    bad = not errors[worst] <= LIMITS[dtype]
    return Verdict(errors[worst], f"{worst} is off by {errors[worst]:.1e}, limit {LIMITS[dtype]:.0e}" if bad else None)


def answer(step: Step, problem: Problem) -> Tensor:
    """One step's loss; its gradients are on the problem."""
    problem.clear()
    loss = step.forward()
    step.backward(loss)
    return loss.detach()


def relative(x: Tensor | None, truth: Tensor) -> float:
    """Infinite for a gradient that is missing or not a number."""
    error = math.inf if x is None else float((x.double() - truth).norm() / truth.norm())
    return error if math.isfinite(error) else math.inf
