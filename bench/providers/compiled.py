"""`torch.compile` of the published formula: the cheapest thing to try before a library."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from ..problem import Problem
from .eager import tdpo2


class Compiled:
    name = "compiled"

    def available(self) -> str | None:
        compilers = (os.environ.get("CXX", "g++"), "clang++", "c++")
        return None if any(map(shutil.which, compilers)) else f"no C++ compiler (looked for {', '.join(compilers)})"

    def make(self, problem: Problem) -> Callable[[], Tensor]:
        """Compiles here, for this shape alone: neither compilation nor dynamic shapes are measured."""
        torch.compiler.reset()
        function = torch.compile(tdpo2, dynamic=False)

        def step() -> Tensor:
            loss = function(problem.hidden, problem.weight, problem.ref_hidden, problem.ref_weight, problem.labels)
            loss.backward()
            return loss.detach()

        step()
        problem.clear()
        return step
