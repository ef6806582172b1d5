"""Compute the published TDPO formula, full logits of both models and autograd: what people run today. Also compiled,
which is the cheapest thing to try before a library."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from ..problem import IGNORE, Problem, Step
from ..shapes import Shape
from .provider import Provider, preference

COPIES = 6  # of fp32 [tokens, vocabulary] that it holds at its peak


def statistics(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, labels: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Return each sequence's log-probability margin and KL over the tokens that count.

    This is the published code in fp32 (float64 stays), with log_softmax for softmax().log(), which underflows.
    """
    mask = labels != IGNORE
    pick = labels.where(mask, 0)[..., None]
    with torch.no_grad():
        ref_logits = _logits(ref_hidden, ref_weight, softcap)
        ref_probs, ref_logp = ref_logits.softmax(-1), ref_logits.log_softmax(-1)
    logp = _logits(hidden, weight, softcap).log_softmax(-1)
    kl_S = ((ref_probs * (ref_logp - logp)).sum(-1) * mask).sum(-1)
    margin_S = ((logp.gather(-1, pick) - ref_logp.gather(-1, pick))[..., 0] * mask).sum(-1)
    return margin_S, kl_S


def _logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    z = hidden @ weight.T
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def tdpo2(*tensors: Tensor | float | None) -> Tensor:
    return preference(*statistics(*tensors))


def dpo(problem: Problem) -> Tensor:
    """Return what is left without the KL: the truth for those who compute no more."""
    return preference(statistics(*tensors(problem))[0], None)


def kl(problem: Problem) -> Tensor:
    return statistics(*tensors(problem))[1]


def tensors(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float | None]:
    return p.hidden, p.weight, p.ref_hidden, p.ref_weight, p.labels, p.softcap


def needs(shape: Shape) -> int:
    return COPIES * 4 * shape.T * shape.V


def _no_compiler(shape: Shape, device: torch.device) -> str:
    compilers = (os.environ.get("CXX", "g++"), "clang++", "c++")
    missing = device.type == "cpu" and not any(map(shutil.which, compilers))
    return f"no C++ compiler (looked for {', '.join(compilers)})" if missing else ""


@lru_cache(maxsize=1)
def _compiled(function: Callable, *case: object) -> Callable:
    """Return a function compiled for one case, so that gate, memory and clock share one compilation."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def _compile(problem: Problem) -> Step:
    """Make a step of the compiled formula. Its first call, which compiles, is the gate's."""
    leaves = (problem.hidden, problem.weight)
    case = ((x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in leaves)
    return Step(partial(_compiled(tdpo2, *case, problem.softcap), *tensors(problem)))


def _compiled_kl(problem: Problem) -> Tensor:
    return _compiled(statistics, problem.hidden.dtype)(*tensors(problem))[1]


PROVIDER = Provider("tdpo2", lambda p: Step(lambda: tdpo2(*tensors(p))), kl=kl, needs=needs)
COMPILED = Provider("tdpo2", _compile, _no_compiler, _compiled_kl, lambda shape: needs(shape) // 2, like=PROVIDER)
