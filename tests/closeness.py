"""Say how close is close enough: no tolerance is picked by hand, torch's own error is the yardstick.

The truth is `truth.py`'s, from the *rounded* inputs. The yardstick is `plain`: what a user writes, in the same dtype
(F.linear, float(), log_softmax, gather, sum of q (log q - log p), autograd). On a peaked row its max-norm is the
rounding of two or three logits, a throw of dice; so it is thrown `THROWS` times, with rows and the hidden axis
shuffled, which changes no number but the order of the sums, and the largest error counts.

The rule, for every tensor, in the max-norm and in the 2-norm::

    error <= 2 x error of plain torch + 4 eps x scale

* statistics: eps is that of the statistics' dtype (fp32 for 16-bit inputs), and the yardstick is plain torch in that
  dtype on the same widened inputs: nothing in the library rounds logits to 16 bits. The scale is what the statistic
  amounts to when every logit moves by a relative eps: ``|z_y| + sum p |z|`` for logp, ``sum |p - q| |z| + sum q
  |delta' - KL| |r| + KL`` for the KL.
* gradients: eps is that of the gradient's dtype, the scale is the norm of the true gradient; of the bias's, which is a
  mere sum over rows, of what it is a sum of.
* 16-bit gradients have a second, sharper bound in the 2-norm, `ROUNDED` of the norm on top of twice the error of
  plain torch in *fp32*: dz, a tile's product (bf16 on a CPU) and the gradient are each rounded once, and nothing is
  ever summed in 16 bits.
* where plain torch makes inf or nan of a finite truth (0 x inf at ruled out tokens), its error counts as 30 eps x
  scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from cases import Cotangents, Problem
from torch import Tensor
from truth import Array, Result, Truth, exact, round_cotangents, truth

from tdpo_kernels import LMHead, token_stats

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
NORMS = ("max", "norm")
ROUNDED = {torch.bfloat16: 4e-3, torch.float16: 3e-3}
THROWS = 16
UNUSABLE = 30.0  # in eps x scale: the error plain torch is said to make where it makes nan


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return [_as_bytes(x) for x in a] == [_as_bytes(x) for x in b]


def _as_bytes(x: Tensor) -> bytes:
    return x.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


# --- ours -------------------------------------------------------------------------------------------------------------


def leaves(problem: Problem) -> tuple[Problem, list[Tensor]]:
    """The problem with fresh leaves in place of what gradients flow to."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (problem.hidden, problem.head.weight))
    bias = None if problem.head.bias is None else problem.head.bias.detach().clone().requires_grad_()
    parts = [hidden, weight] if bias is None else [hidden, weight, bias]
    return replace(problem, hidden=hidden, head=replace(problem.head, weight=weight, bias=bias)), parts


def stats_of(problem: Problem, backend: str, budget: int, **options):
    return token_stats(
        problem.hidden, problem.head, problem.ref_hidden, problem.ref_head, problem.labels,
        ignore_index=problem.ignore_index, shift=problem.shift, backend=backend, memory_budget=budget, **options,
    )  # fmt: skip


def budget_of(problem: Problem, part: float) -> int:
    """Bytes that hold this part of both models' logits."""
    size = problem.stats_dtype.itemsize
    return int(2 * problem.labels.numel() * problem.head.weight.shape[0] * size * part)


def pull(values: tuple[Tensor, Tensor], cotangents: Cotangents, parts: list[Tensor]) -> list[Tensor]:
    used = [(x, g) for x, g in zip(values, cotangents, strict=True) if g is not None]
    return torch.autograd.grad([x for x, _ in used], parts, [g for _, g in used], materialize_grads=True)


def ours(
    problem: Problem,
    cotangents: Cotangents,
    backend: str,
    budget: int,
    split: Callable[[Problem], Problem] = lambda x: x,
) -> tuple[Result, list[Tensor]]:
    """The library's numbers, and all that must be exactly zero: what belongs to labels that do not count. `split`: what
    is made of the problem once its leaves are."""
    at, by = problem.rows()
    problem, parts = leaves(problem)
    out = stats_of(split(problem), backend, budget)
    grads = pull((out.logp, out.kl), round_cotangents(problem, cotangents), parts)
    values = [x.detach().flatten().cpu() for x in (out.logp, out.ref_logp, out.kl)]
    expected = [problem.stats_dtype] * 3 + [x.dtype for x in parts]
    assert [x.dtype for x in (*values, *grads)] == expected, (
        "statistics in stats_dtype, gradients in their parameter's dtype"
    )
    rest = [_without(x, at) for x in values] + [_without(grads[0].cpu().flatten(0, -2), by)]
    return Result(*(exact(x[at]) for x in values), *_three(grads)), rest


def _without(x: Tensor, index: Tensor) -> Tensor:
    keep = torch.ones(x.shape[0], dtype=torch.bool)
    keep[index] = False
    return x[keep]


def _three(grads: list[Tensor]) -> tuple[Array, Array, Array | None]:
    hidden, weight, *bias = (exact(g) for g in grads)
    return hidden.reshape(-1, hidden.shape[-1]), weight, bias[0] if bias else None


# --- plain torch ------------------------------------------------------------------------------------------------------


def plain(problem: Problem, cotangents: Cotangents, seed: int = 0) -> Result:
    """Return plain torch's numbers, with rows in another order for each seed but 0."""
    at, by = (x.to(problem.hidden.device) for x in problem.rows())
    order = torch.randperm(len(at), generator=torch.Generator().manual_seed(seed)) if seed else torch.arange(len(at))
    at, by, back = at[order], by[order], order.argsort()
    labels = problem.labels.flatten()[at]
    problem, parts = leaves(problem)
    z, r = (
        _plain_logits(h, head, by)
        for h, head in ((problem.hidden, problem.head), (problem.ref_hidden, problem.ref_head))
    )
    log_p, log_q = z.log_softmax(-1), r.log_softmax(-1)
    logp, ref_logp = (x.gather(1, labels[:, None])[:, 0] for x in (log_p, log_q))
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    g = [g if g is None else g.flatten()[at].to(x.dtype) for g, x in zip(cotangents, (logp, kl), strict=True)]
    grads = pull((logp, kl), tuple(g if g is None else g.to(logp.device) for g in g), parts)
    return Result(*(exact(x)[back] for x in (logp, ref_logp, kl)), *_three(grads))


def shuffled(problem: Problem, seed: int) -> tuple[Problem, Array]:
    """The same problem with both hidden axes in another order, and where each of the policy's features has gone."""
    g = torch.Generator().manual_seed(seed)
    d, e = (torch.randperm(x.shape[-1], generator=g).to(x.device) for x in (problem.hidden, problem.ref_hidden))
    return replace(
        problem, hidden=problem.hidden[..., d], head=replace(problem.head, weight=problem.head.weight[:, d]),
        ref_hidden=problem.ref_hidden[..., e], ref_head=replace(problem.ref_head, weight=problem.ref_head.weight[:, e]),
    ), d.argsort().cpu().numpy()  # fmt: skip


def throws(problem: Problem, cotangents: Cotangents) -> list[Result]:
    results = [plain(problem, cotangents)]
    for seed in range(1, THROWS):
        other, back = shuffled(problem, seed)
        found = plain(other, cotangents, seed)
        results.append(replace(found, hidden=found.hidden[:, back], weight=found.weight[:, back]))
    return results


def _plain_logits(hidden: Tensor, head: LMHead, rows: Tensor) -> Tensor:
    x = F.linear(hidden.flatten(0, -2)[rows], head.weight, head.bias)
    if head.logit_scale != 1.0:
        x = x * head.logit_scale
    if head.softcap is not None:
        x = head.softcap * torch.tanh(x / head.softcap)
    if head.bias is not None and (head.softcap is not None or head.logit_scale < 0):
        x = x.masked_fill(torch.isneginf(head.bias), -torch.inf)
    return x if x.dtype == torch.float64 else x.float()


# --- the rule ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """Hold the bounds of one problem's numbers; made once, used for every backend and budget."""

    truth: Truth
    bounds: dict[str, list[tuple[str, float]]]  # of each tensor, ("max" or "norm", the largest error allowed)

    def faults(self, found: Result) -> list[str]:
        out = []
        for name, bounds in self.bounds.items():
            error = _error(getattr(found, name), getattr(self.truth.result, name))
            for norm, bound in bounds:
                size = _size(error, norm)
                if not size <= bound:
                    scale = _size(getattr(self.truth.result, name), norm)
                    out.append(f"{name}: {norm} of the error {size:.3g} > {bound:.3g} (truth's {norm} is {scale:.3g})")
        return out


def judge(problem: Problem, cotangents: Cotangents) -> Judge:
    cotangents = round_cotangents(problem, cotangents)
    true = truth(problem, cotangents)
    wide = throws(problem.to(problem.stats_dtype), cotangents)
    narrow = throws(problem, cotangents) if problem.hidden.dtype in SIXTEEN_BIT else wide
    eps, stats_eps = (torch.finfo(d).eps for d in (problem.hidden.dtype, problem.stats_dtype))
    bounds: dict[str, list[tuple[str, float]]] = {}
    for name in Result.NAMES:
        want = getattr(true.result, name)
        if want is None:
            continue
        if name in Result.STATISTICS:
            bounds[name] = [(n, _bound(n, name, want, wide, true.scale[name], stats_eps)) for n in NORMS]
            continue
        scale = true.scale.get(name, want)
        bounds[name] = [(n, _bound(n, name, want, narrow, scale, eps)) for n in NORMS]
        if narrow is not wide:
            size = _size(want, "norm")
            sharp = _bound("norm", name, want, wide, want, stats_eps)
            smallest = torch.finfo(problem.hidden.dtype).tiny * eps * want.size**0.5  # that this dtype holds
            bounds[name].append(("norm", sharp + ROUNDED[problem.hidden.dtype] * size + smallest))
    return Judge(true, bounds)


def _bound(norm: str, name: str, want: Array, plain: list[Result], scale: Array, eps: float) -> float:
    unit = eps * _size(scale, norm)
    errors = [_size(_error(getattr(x, name), want), norm) for x in plain]
    usable = [e for e in errors if np.isfinite(e)]
    return 2 * (max(usable) if usable else UNUSABLE * unit) + 4 * unit


def _error(have: Array, want: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return np.where(have == want, 0, np.abs(have - want))  # equal infinities are no error


def _size(x: Array, norm: str) -> float:
    if x.size == 0:
        return 0.0
    return float(np.abs(x).max() if norm == "max" else np.sqrt((x * x).sum()))
