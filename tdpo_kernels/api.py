"""Compute `fused_tdpo_loss`: `token_stats` and then the loss, or both a group of pairs at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from . import checks, groups
from .backends import BACKENDS
from .loss import cotangent_ratios, preference_loss, sums_gradient
from .op import DEFAULT_BUDGET, checked, statistics
from .pack import counted
from .types import LMHead, TDPOOutput


def fused_tdpo_loss(
    hidden: Tensor, head: Tensor | nn.Linear | LMHead, ref_hidden: Tensor, ref_head: Tensor | nn.Linear | LMHead,
    labels: Tensor, *, beta: float = 0.1, alpha: float | None = None, variant: str = "tdpo2",
    ignore_index: int | None = -100, shift: bool = True, reduction: str = "mean", cu_seqlens: Tensor | None = None,
    extras: tuple[str, ...] = (), backend: str = "auto", memory_budget: int = DEFAULT_BUDGET, sft_weight: float = 0.0,
    length_normalized: bool = False,
) -> TDPOOutput:  # fmt: skip
    """Return the loss of Token-level Direct Preference Optimization (Zeng et al. 2024, arXiv 2404.11999).

    It takes eqs. (3) to (5) of `tdpo_kernels.reference` on top of `token_stats`, which documents the arguments they
    share.

    Args:
        hidden: ``(2P, L, D)``, the P chosen rows first, then their rejected partners in the same order; or ``(N, D)``
            packed, with ``cu_seqlens`` of length ``2P + 1`` and the chosen sequences first. P >= 1.
        ref_hidden: ``(2P, L, E)`` or ``(N, E)``, of the reference model; detached.
        labels: ``(2P, L)`` or ``(N,)``; prompts and padding set to ``ignore_index``.
        beta: > 0, the strength of the pull towards the reference.
        alpha: >= 0, the weight of the KL difference in TDPO2; None means 0.5. ``alpha=0`` is DPO. TDPO1 has none,
            and giving one raises.
        variant: ``"tdpo2"`` or ``"tdpo1"``. TDPO1 is not TDPO2 with alpha = 1: the values are equal, the gradients not.
        reduction: how pairs are reduced: ``"mean"``, ``"sum"``, or ``"none"`` for one loss per pair.
        memory_budget: as in `token_stats`. With a frozen head, or with a trained one where not all logits fit, forward
            already makes the gradients, so that no logits are made twice. Backward then multiplies them, and does not
            notice that a weight was changed in between.
        sft_weight: >= 0, the weight of a term added to each pair's loss: the chosen completion's mean negative
            log-probability a token (``pref_ftx`` in LLaMA-Factory). It is no part of TDPO.
        length_normalized: True: log-ratios and KLs of a sequence, eq. (3), and so its reward, are means over its tokens
            instead of sums. beta then wants to be as many times larger as completions have tokens.

    Returns:
        `TDPOOutput`. An empty completion counts as m = k = 0. With every label ignored the loss is log 2 and
        gradients are zero, not None.

    Raises:
        TypeError, ValueError: if an argument is wrong; the message says which, what was seen and what is wanted.
    """
    terms = checks.check_loss(beta, alpha, variant, reduction, sft_weight, length_normalized)
    checks.check_tensor(hidden, "hidden")
    if cu_seqlens is not None:
        checks.check_tensor(cu_seqlens, "cu_seqlens")
    checks.check_pairs(hidden, cu_seqlens)
    call = checked(
        hidden, head, ref_hidden, ref_head, labels, ignore_index=ignore_index, shift=shift, cu_seqlens=cu_seqlens,
        extras=extras, backend=backend, memory_budget=memory_budget,
    )  # fmt: skip
    counts = terms.length_normalized or terms.sft_weight > 0
    which = counted(labels, cu_seqlens, call.ignore_index, shift) if counts else None
    loss = partial(preference_loss, terms=terms, reduction=reduction, cu_seqlens=cu_seqlens, counted=which)
    plan = groups.plan(call) if reduction != "none" else None
    if plan is None:
        return loss(statistics(call, cotangent_ratios(terms)))
    pairs = len(plan.counts_S) // 2 if reduction == "mean" else 1

    def gradient(logp_S: Tensor, ref_S: Tensor, kl_S: Tensor, count_S: Tensor) -> list[Tensor]:
        return [g_S / pairs for g_S in sums_gradient(logp_S, ref_S, kl_S, terms, count_S)]

    stats, gradients = groups.run(call, plan, gradient)
    out, (hidden, head, _) = loss(stats), call.policy
    return replace(out, loss=groups.Given.apply(out.loss, gradients, hidden, head.weight, head.bias))


class TDPOLoss(nn.Module):
    """Call `fused_tdpo_loss` with options fixed at construction, for trainers that hold their loss as a module."""

    def __init__(
        self, *, beta: float = 0.1, alpha: float | None = None, variant: str = "tdpo2", ignore_index: int | None = -100,
        shift: bool = True, reduction: str = "mean", extras: tuple[str, ...] = (), backend: str = "auto",
        memory_budget: int = DEFAULT_BUDGET, sft_weight: float = 0.0, length_normalized: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        checks.check_loss(beta, alpha, variant, reduction, sft_weight, length_normalized)
        checks.check_options(ignore_index, shift, extras, memory_budget)
        checks.check_backend(backend, BACKENDS)
        self.options = dict(
            beta=beta, alpha=alpha, variant=variant, ignore_index=ignore_index, shift=shift,
            reduction=reduction, extras=extras, backend=backend, memory_budget=memory_budget, sft_weight=sft_weight,
            length_normalized=length_normalized,
        )  # fmt: skip

    def forward(
        self, hidden: Tensor, head: Tensor | nn.Linear | LMHead, ref_hidden: Tensor,
        ref_head: Tensor | nn.Linear | LMHead, labels: Tensor, cu_seqlens: Tensor | None = None,
    ) -> TDPOOutput:  # fmt: skip
        return fused_tdpo_loss(hidden, head, ref_hidden, ref_head, labels, cu_seqlens=cu_seqlens, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
