"""Split a vocabulary over ranks, for tests, and make a call to split."""

from __future__ import annotations

from dataclasses import replace

import torch
from batches import EXTRAS
from torch import Tensor

from tdpo_kernels import LMHead, TokenStats, token_stats

P, L, D, E = 3, 7, 8, 6
CUTS = ("chunk", "even", "one", "last")


def rows_of(V: int, world: int, how: str) -> list[slice]:
    """Return each rank's rows: as torch cuts; as evenly as it goes; one, none, none and the rest; the last has all."""
    if how == "chunk":
        step = -(-V // world)
        ends = [min(step * (k + 1), V) for k in range(world)]
    elif how == "even":
        ends = [V * (k + 1) // world for k in range(world)]
    else:
        ends = [1 if how == "one" else 0] * (world - 1) + [V]
    return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def cut(head: LMHead, rows: slice) -> LMHead:
    return replace(head, weight=head.weight[rows], bias=None if head.bias is None else head.bias[rows])


def call_of(V: int, seed: int, dtype: torch.dtype, hard: str = "") -> dict:
    """Pairs of ragged lengths. `hard`: what else is special about the heads."""
    g = torch.Generator().manual_seed(seed)
    x, ref = (torch.randn(2 * P, L, n, generator=g, dtype=torch.float64) for n in (D, E))
    weight, ref_weight = (torch.randn(V, n, generator=g, dtype=torch.float64) * 0.7 for n in (D, E))
    bias, ref_bias = torch.randn(2, V, generator=g, dtype=torch.float64)
    options, ref_options = dict(logit_scale=1.0, softcap=None), dict(logit_scale=0.5, softcap=None)
    if hard == "equal":
        ref, ref_weight, ref_bias, ref_options = x, weight, bias, options
    if hard == "ruled out":  # the first columns, so whole ranks of small vocabularies
        bias[: V // 2] = ref_bias[: V // 2] = -torch.inf
    if hard == "ruled out by policy":
        bias[: V // 2] = -torch.inf
    labels = torch.randint(V // 2 if "ruled out" in hard else 0, V, (2 * P, L), generator=g)
    labels[0, :4] = labels[P, 5:] = -100
    tensors = (x, weight, bias, ref, ref_weight, ref_bias)
    x, weight, bias, ref, ref_weight, ref_bias = (t.to(dtype) for t in tensors)
    head, ref_head = LMHead(weight, bias, **options), LMHead(ref_weight, ref_bias, **ref_options)
    return dict(hidden=x, head=head, ref_hidden=ref, ref_head=ref_head, labels=labels)


def evaluated(call: dict, head: LMHead, **options) -> tuple[TokenStats, list[Tensor]]:
    """The statistics, and the gradients for random cotangents: to hidden, weight and bias."""
    hidden = call["hidden"].clone().requires_grad_()
    stats = token_stats(**call | {"hidden": hidden, "head": head}, extras=EXTRAS, **options)
    g = torch.Generator().manual_seed(9)
    g_logp, g_kl = torch.randn(2, *stats.logp.shape, generator=g, dtype=torch.float64).to(stats.logp.dtype)
    g_kl[0], g_kl[1] = 0.0, g_logp[1]  # DPO's rows, and TDPO1's
    grads = torch.autograd.grad([stats.logp, stats.kl], [hidden, head.weight, head.bias], [g_logp, g_kl])
    return stats, list(grads)


def leaf(head: LMHead) -> LMHead:
    weight, bias = head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()
    return LMHead(weight, bias, head.logit_scale, head.softcap)


def near(got: Tensor, want: Tensor, what: str) -> None:
    """Assert that float64 numbers agree within some roundings of the largest entry."""
    assert got.dtype == want.dtype == torch.float64 and got.shape == want.shape, what
    finite = torch.isfinite(want)
    assert torch.equal(got[~finite], want[~finite]), what
    scale, error = (x[finite].abs().max().item() if finite.any() else 0.0 for x in (want, got - want))
    assert error <= 64 * torch.finfo(want.dtype).eps * scale + 1e-300, f"{what}: {error:.2e} of {scale:.2e}"
