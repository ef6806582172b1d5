"""Compose TDPO from the chunked kernels that TRL's own trainers use: log-probabilities of both models, and the forward
KL of `ChunkedDivergenceFunction`. This is the nearest thing a user has without this library."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from ..problem import Problem
from ..shapes import Shape
from .provider import Provider, Step, per_sequence, preference

SINCE = (1, 15)  # the first with a chunked divergence
FORWARD_KL, TEMPERATURE = 0.0, 1.0


def unavailable(shape: Shape, device: torch.device) -> str:
    try:
        found = version("trl")
    except PackageNotFoundError:
        return "trl is not installed"
    old = tuple(int(n) for n in found.split(".")[:2]) < SINCE
    if old:
        return f"trl {found} has no chunked divergence, 1.15 has"
    try:
        import trl.kernels.chunked_divergence  # noqa: F401
    except ImportError as error:  # a wheel without what it depends on
        return f"trl {found} does not import: {error}"
    return ""


def make(problem: Problem) -> Step:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    labels_T, bias, scale, outputs = problem.packed(problem.labels), None, 1.0, ()
    options = (labels_T, TEMPERATURE, CHUNK, problem.softcap, scale, outputs)

    def logp_T(hidden: Tensor, weight: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(problem.packed(hidden), weight, bias, *options)[0]

    def forward() -> Tensor:
        with torch.no_grad():
            ref_logp_T = logp_T(problem.ref_hidden, problem.ref_weight)
        margin_T = logp_T(problem.hidden, problem.weight) - ref_logp_T
        return preference(per_sequence(margin_T, problem), kl(problem))

    return Step(forward)


def kl(problem: Problem) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    p, scale = problem, 1.0
    kl_T, _entropy = ChunkedDivergenceFunction.apply(
        p.packed(p.hidden), p.weight, None, p.packed(p.ref_hidden), p.ref_weight, None, FORWARD_KL, TEMPERATURE,
        scale, p.softcap, scale, p.softcap,
    )  # fmt: skip
    return per_sequence(kl_T, problem)


PROVIDER = Provider("tdpo2", unavailable, make, kl)
