"""Compose the loss of what other libraries have: log-probabilities of both models, and a forward KL where there is one.

TRL's are the chunked functions of its own trainers, the nearest thing a user has without this library. Liger's fused
linear losses fold a batch into one number, so every sequence, whose share in TDPO's loss is its own, needs a call of
its own. Apple's cut-cross-entropy and torch's chunked `linear_cross_entropy` have no KL: less than TDPO.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from ..problem import Problem, Step
from ..shapes import Shape
from .provider import Provider, per_sequence, preference

FORWARD_KL, TEMPERATURE, SCALE = 0.0, 1.0, 1.0
Logp = Callable[[Problem, Tensor, Tensor], Tensor]  # of packed hidden states and a head: per token or per sequence


def _trl(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    options = (problem.packed(problem.labels), TEMPERATURE, CHUNK, problem.softcap, SCALE, ())
    return ChunkedLogProbFunction.apply(hidden, weight, None, *options)[0]


def _trl_kl(p: Problem) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    sides = p.packed(p.hidden), p.weight, None, p.packed(p.ref_hidden), p.ref_weight, None
    options = FORWARD_KL, TEMPERATURE, SCALE, p.softcap, SCALE, p.softcap
    return per_sequence(ChunkedDivergenceFunction.apply(*sides, *options)[0], p)


def _liger(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as cross_entropy

    lots = zip(*(x.chunk(len(problem.labels)) for x in (hidden, problem.packed(problem.labels))), strict=True)
    options = dict(reduction="sum", accum_dtype=torch.float32)
    return torch.stack([-cross_entropy(h, weight, y, **options) for h, y in lots])


def _liger_kl(p: Problem) -> Tensor:
    """Multiply Liger's divergence by the number of tokens, which it has divided by."""
    from liger_kernel.transformers.functional import liger_fused_linear_jsd as jsd

    lots = zip(*(p.packed(x).chunk(len(p.labels)) for x in (p.hidden, p.ref_hidden)), strict=True)
    options = dict(jsd_beta=FORWARD_KL, accum_dtype=torch.float32)
    return torch.stack([len(h) * jsd(h, p.weight, h_ref, p.ref_weight, **options) for h, h_ref in lots])


def _cce(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    options = dict(softcap=problem.softcap, reduction="none", impl="cce")
    return -linear_cross_entropy(hidden, weight, problem.packed(problem.labels), **options)


def _linear_ce(problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    options = dict(reduction="none", options=torch.nn.LinearCrossEntropyOptions())
    return -torch.nn.functional.linear_cross_entropy(hidden, weight, problem.packed(problem.labels), **options)


def _composed(logp: Logp, kl: Callable[[Problem], Tensor] | None, **needed) -> Provider:
    def make(problem: Problem) -> Step:
        def forward() -> Tensor:
            with torch.no_grad():
                ref_logp = logp(problem, problem.packed(problem.ref_hidden), problem.ref_weight)
            margin = logp(problem, problem.packed(problem.hidden), problem.weight).float() - ref_logp.float()
            return preference(per_sequence(margin, problem), kl and kl(problem))

        return Step(forward)

    return Provider("tdpo2" if kl else "dpo", make, partial(_lacks, **needed), kl)


def _lacks(shape: Shape, device: torch.device, module: str, name: str, cuda: bool = False, softcap: bool = True) -> str:
    """Return why a library cannot run: `name` has to be in `module`, which is imported last as it may take seconds."""
    if find_spec(module.split(".")[0]) is None:
        return f"{module.split('.')[0]} is not installed"
    if cuda and device.type != "cuda":
        return f"its Triton kernels run on CUDA, not on {device.type}"
    if shape.softcap and not softcap:
        return "it has no softcap"
    try:
        return "" if hasattr(import_module(module), name) else f"{module} has no {name}"
    except ImportError as error:  # an old version, or a wheel without what it depends on
        return f"{module} does not import: {error}"


LIGER = "liger_kernel.transformers.functional"
PROVIDERS = {
    "trl": _composed(_trl, _trl_kl, module="trl.kernels.chunked_divergence", name="ChunkedDivergenceFunction"),
    "liger": _composed(_liger, _liger_kl, module=LIGER, name="liger_fused_linear_jsd", cuda=True, softcap=False),
    "cce": _composed(_cce, None, module="cut_cross_entropy", name="linear_cross_entropy", cuda=True),
    "linear_ce": _composed(_linear_ce, None, module="torch.nn", name="LinearCrossEntropyOptions", softcap=False),
}
