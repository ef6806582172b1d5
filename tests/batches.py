"""Small batches with random weights, padded or packed, what the reference makes of them, and outputs compared."""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpo_kernels import LMHead, TDPOOutput, TokenStats, reference
from tdpo_kernels.loss import Terms, preference_loss

EVERYTHING = 2**40
EXTRAS = ("entropy", "mean_logit", "is_argmax")
P, L, D, E, V = 2, 9, 8, 6, 37
VARIANTS = {"tdpo1": dict(variant="tdpo1"), "tdpo2": dict(alpha=0.7), "dpo": dict(alpha=0.0)}


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
    return preference_loss(reference_stats(call), Terms(beta, alpha, variant), "none")


def grads(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def close(got: object, want: object, tol: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


# --- with ignored prompts and padding, and packed ---------------------------------------------------------------------


def ragged_batch(dtype: torch.dtype = torch.float64, rows: int = 2 * P, seed: int = 0) -> dict:
    """Return a shifted call with ragged prompts and padding that are ignored."""
    call = batch(dtype, rows, L, D, V, seed, E)
    del call["shift"]
    for s, row in enumerate(call["labels"]):
        row[: s % 3 + 1] = -100
        row[L - s % 2 :] = -100
    return call


def headed(dtype: torch.dtype = torch.float64, packed: bool = False) -> dict:
    """Return three ragged pairs whose head has a bias, a scale and a softcap."""
    call = ragged_batch(dtype, rows=6)
    bias = torch.linspace(-1, 1, V, dtype=torch.float64).to(dtype)
    call["head"] = LMHead(call["head"].detach(), bias, 1.3, 20.0)
    return pack(call, [9, 0, 4, 1, 7, 6]) if packed else call


def trained(call: dict, frozen: bool = False) -> tuple[dict, list[Tensor]]:
    """Return the call with fresh leaves, and the leaves."""
    head, hidden = call["head"], call["hidden"].detach().clone().requires_grad_()
    weight = head.weight.detach().clone().requires_grad_(not frozen)
    bias = None if head.bias is None else head.bias.detach().clone().requires_grad_(not frozen)
    head = LMHead(weight, bias, head.logit_scale, head.softcap)
    leaves = [hidden, weight, bias] if bias is not None else [hidden, weight]
    return call | {"hidden": hidden, "head": head}, [hidden] if frozen else leaves


def pack(call: dict, lengths: list[int]) -> dict:
    """Return the first `lengths[s]` positions of each row, end to end."""
    out = dict(call)
    for name in ("hidden", "ref_hidden", "labels"):
        out[name] = torch.cat([row[:n] for row, n in zip(call[name], lengths, strict=True)])
    return out | {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}


def ragged() -> tuple[dict, list[int]]:
    """Return right-padded sequences: one of no tokens at all, one with an empty completion, one of a single token."""
    lengths = [L, 0, 4, 1, L - 2, 6]
    call = ragged_batch(rows=6)
    labels = call["labels"].clone()
    for s, n in enumerate(lengths):
        labels[s, n:] = -100
    labels[2] = -100
    return call | {"labels": labels}, lengths


def fields_equal(a: TDPOOutput | TokenStats, b: TDPOOutput | TokenStats) -> None:
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        fields_equal(x, y) if isinstance(x, TokenStats) else close(x, y)
