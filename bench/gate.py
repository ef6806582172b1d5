"""Nothing wrong is timed: every provider first answers a small cut of the shape, against the formula in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from .problem import make_problem
from .providers import Provider
from .providers.eager import Eager
from .shapes import Shape

LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}
ROWS, COLUMNS = 128, 5003  # few enough for float64, enough for several tiles and a ragged one


@dataclass(frozen=True)
class Verdict:
    error: float | None  # the largest of the loss's and each gradient's error, relative to its norm
    complaint: str | None = None


def check(provider: Provider, shape: Shape, dtype: str) -> Verdict:
    cut = replace(shape, T=min(shape.T, ROWS), V=min(shape.V, COLUMNS))
    problem = make_problem(cut, dtype)
    truth = problem.double()
    true_loss = Eager().make(truth)()
    try:
        loss = provider.make(problem)()
    except Exception as error:  # a provider that cannot run is a finding, not the end of the others' measurement
        return Verdict(None, f"{type(error).__name__}: {error}".splitlines()[0])
    wanted = {"loss": true_loss, **truth.gradients()}
    errors = {name: _error(x, wanted[name]) for name, x in {"loss": loss, **problem.gradients()}.items()}
    worst = max(errors, key=errors.__getitem__)
    bad = not errors[worst] <= LIMITS[dtype]
    return Verdict(errors[worst], f"{worst} is off by {errors[worst]:.1e}, limit {LIMITS[dtype]:.0e}" if bad else None)


def _error(x: Tensor | None, truth: Tensor) -> float:
    """Infinite for a gradient that is missing or not a number."""
    error = math.inf if x is None else float((x.double() - truth).norm() / truth.norm())
    return error if math.isfinite(error) else math.inf
