"""`torch.compile` of the published formula: the cheapest thing to try before a library."""

from __future__ import annotations

import os
import shutil

import torch
from torch import Tensor

from ..problem import Problem
from ..shapes import Shape
from . import eager
from .provider import Provider, Step


def unavailable(shape: Shape, device: torch.device) -> str:
    compilers = (os.environ.get("CXX", "g++"), "clang++", "c++")
    missing = device.type == "cpu" and not any(map(shutil.which, compilers))
    return f"no C++ compiler (looked for {', '.join(compilers)})" if missing else ""


def make(problem: Problem) -> Step:
    """Compiles here, for this shape alone: neither compilation nor dynamic shapes are measured."""
    torch.compiler.reset()
    function = torch.compile(eager.tdpo2, dynamic=False)
    function(*eager.tensors(problem)).backward()
    problem.clear()
    return Step(lambda: function(*eager.tensors(problem)))


def kl(problem: Problem) -> Tensor:
    return torch.compile(eager.statistics, dynamic=False)(*eager.tensors(problem))[1]


PROVIDER = Provider("tdpo2", unavailable, make, kl, lambda shape: eager.needs(shape) // 2)
