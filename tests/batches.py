"""A small batch with random weights, what the reference makes of it, its gradients, and budgets to ask for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tdpo_kernels import LMHead, TDPOOutput, TokenStats, reference
from tdpo_kernels.loss import preference_loss

EVERYTHING = 2**40
budgets = pytest.mark.parametrize("budget", [0, 1200, EVERYTHING])


def batch(
    dtype: torch.dtype = torch.float64, rows: int = 4, length: int = 3, D: int = 3, V: int = 19, seed: int = 0,
    E: int | None = None, shift: bool = False,
) -> dict:  # fmt: skip
    """Return a call's arguments; the policy's parameters want gradients."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    E = D if E is None else E
    return dict(
        hidden=randn(rows, length, D).requires_grad_(), head=randn(V, D).requires_grad_(),
        ref_hidden=randn(rows, length, E), ref_head=randn(V, E),
        labels=torch.randint(0, V, (rows, length), generator=gen), shift=shift,
    )  # fmt: skip


def reference_stats(call: dict) -> TokenStats:
    """Return what `tdpo_kernels.reference` makes of padded rows, in the dtype they have."""
    labels, shift = call["labels"], call.get("shift", True)
    logits = []
    for name in ("", "ref_"):
        head, hidden = call[f"{name}head"], call[f"{name}hidden"]
        head = head if isinstance(head, LMHead) else LMHead(head)
        logits.append(reference.logits(hidden.flatten(0, -2), head, hidden.dtype))
    predicted = F.pad(labels[..., 1:], (0, 1), value=-100) if shift else labels
    found = reference.statistics(*logits, predicted.clamp(min=0).flatten())
    found = [torch.where(predicted == -100, 0.0, x.view_as(predicted)) for x in found]
    logp, ref_logp, kl = (F.pad(x[..., :-1], (1, 0)) for x in found) if shift else found
    return TokenStats(logp, ref_logp.detach(), kl)


def reference_loss(call: dict, beta: float = 0.1, alpha: float = 0.5, variant: str = "tdpo2") -> TDPOOutput:
    """Return eqs. (1) to (5) per pair, as `test_oracle` holds them to be."""
    return preference_loss(reference_stats(call), beta=beta, alpha=alpha, variant=variant, reduction="none")


def grads(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def close(got: object, want: object, tol: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)
