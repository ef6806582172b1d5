"""Heads of every kind, and tensors that lie in memory as they please."""

from __future__ import annotations

import math

import pytest
import torch
from batches import close, grads, reference_loss
from packed import D, E, L, P, V, fields_equal, ragged_batch
from runnable import backends
from torch import nn

from tdpo_kernels import LMHead, fused_tdpo_loss


@pytest.fixture(autouse=True)
def _tiles(small_tiles) -> None:
    """Tiles of 5 x 16, so that a few rows already cross row blocks and column blocks."""
    small_tiles(5, 16)


@backends
@pytest.mark.parametrize("bias", [True, False])
def test_tensor_linear_and_lm_head_agree(backend: str, bias: bool):
    call = ragged_batch()
    linear, ref_linear = nn.Linear(D, V, bias).double(), nn.Linear(E, V, bias).double()
    as_heads = dict(head=LMHead(linear.weight, linear.bias), ref_head=LMHead(ref_linear.weight, ref_linear.bias))
    a = fused_tdpo_loss(**call | dict(head=linear, ref_head=ref_linear), backend=backend)
    b = fused_tdpo_loss(**call | as_heads, backend=backend)
    fields_equal(a, b)
    parameters = [x for x in (linear.weight, linear.bias) if x is not None]
    close(grads(a.loss, *parameters), grads(b.loss, *parameters))
    if not bias:
        fields_equal(a, fused_tdpo_loss(**call | dict(head=linear.weight, ref_head=ref_linear.weight), backend=backend))


STORAGES = {
    "transposed": lambda x: x.detach().transpose(0, -1).contiguous().transpose(0, -1),
    "every second row": lambda x: torch.stack([x.detach(), torch.full_like(x, math.nan)], 1).flatten(0, 1)[::2],
    "every second column": lambda x: torch.stack([x.detach(), torch.full_like(x, math.nan)], -1).flatten(-2)[..., ::2],
    "slice of wider rows": lambda x: torch.cat([x.detach(), torch.full_like(x, math.nan)], -1)[..., : x.shape[-1]],
}


@backends
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", ["hidden", "head", "ref_hidden", "ref_head", "labels"])
def test_strides_do_not_matter(backend: str, storage: str, name: str):
    call = ragged_batch()
    if name == "labels" and storage in ("every second row", "every second column", "slice of wider rows"):
        changed = torch.stack([call[name], torch.full_like(call[name], V + 9)], -1).flatten(-2)[..., ::2]
    else:
        changed = STORAGES[storage](call[name])
    assert not changed.is_contiguous()
    if name in ("hidden", "head"):
        changed.requires_grad_()
    other = call | {name: changed}
    a, b = (fused_tdpo_loss(**x, backend=backend) for x in (call, other))
    fields_equal(a, b)
    leaves = ("hidden", "head")
    close(grads(a.loss, *(call[n] for n in leaves)), grads(b.loss, *(other[n] for n in leaves)))


@backends
def test_expanded_tensors(backend: str):
    call = ragged_batch()
    one, column = call["hidden"].detach()[:1].clone(), call["head"].detach()[:, :1].clone()
    one.requires_grad_(), column.requires_grad_()
    expanded = call | {"hidden": one.expand(2 * P, L, D), "head": column.expand(V, D)}
    expanded["ref_hidden"] = call["ref_hidden"][:1].expand(2 * P, L, E)
    copied = {n: x.contiguous() for n, x in expanded.items()}
    a, b = (fused_tdpo_loss(**x, backend=backend) for x in (expanded, copied))
    fields_equal(a, b)
    close(grads(a.loss, one, column), grads(b.loss, one, column))


@backends
def test_expanded_leaf_head(backend: str):
    """A leaf that is itself a stride-0 view still gets a whole gradient."""
    call = ragged_batch()
    head = call["head"].detach()[:, :1].expand(V, D).detach().requires_grad_()
    copied = head.detach().contiguous().requires_grad_()
    a, b = (grads(fused_tdpo_loss(**call | {"head": h}, backend=backend).loss, h) for h in (head, copied))
    close(a, b)


@backends
@pytest.mark.parametrize("detach", [True, False])
def test_tied_reference_head(backend: str, detach: bool):
    """Same tensor on both sides: the policy's gradient only."""
    call = ragged_batch()
    alone = {"ref_hidden": call["hidden"].detach() + 0.5, "ref_head": call["head"].detach()}
    want = reference_loss(call | alone).loss
    tied = call | {"ref_hidden": call["hidden"] + 0.5, "ref_head": call["head"]}
    if detach:
        tied |= {n: tied[n].detach() for n in ("ref_hidden", "ref_head")}
    out = fused_tdpo_loss(**tied, reduction="none", backend=backend)
    close(out.loss, want)
    leaves = call["hidden"], call["head"]
    close(grads(out.loss.sum(), *leaves), grads(want.sum(), *leaves))


INFERENCE = [["labels"], ["head"], ["hidden"], ["ref_hidden", "ref_head"], ["labels", "head", "ref_hidden", "ref_head"]]


@backends
@pytest.mark.parametrize("names", INFERENCE, ids="+".join)
@pytest.mark.parametrize("whole", [False, True], ids=["ignored", "whole"])
def test_what_needs_no_gradient_may_come_from_inference_mode(backend: str, names: list[str], whole: bool):
    """A collator, a frozen head, a frozen backbone, the reference: any of them may run under inference mode."""
    call = ragged_batch()
    if whole:
        call |= {"labels": torch.randint(0, V, (2 * P, L))}
    with torch.inference_mode():
        frozen = {name: call[name].detach().clone() for name in names}
    leaves = [call[name] for name in ("hidden", "head") if name not in names]
    options = dict(shift=not whole, backend=backend)
    detached = {name: call[name].detach() for name in names}
    a, b = (fused_tdpo_loss(**call | x, **options) for x in (detached, frozen))
    assert torch.equal(a.loss, b.loss)
    close(grads(b.loss, *leaves), grads(a.loss, *leaves), 0)
