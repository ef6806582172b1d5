"""Heads of every kind, and tensors that lie in memory as they please."""

from __future__ import annotations

import math

import pytest
import torch
from batches import D, E, L, P, V, close, fields_equal, grads, ragged_batch, reference_loss
from runnable import backends
from torch import nn

from tdpo_kernels import LMHead, fused_tdpo_loss

pytestmark = pytest.mark.usefixtures("tiles_of_5_by_16")


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


NAN = math.nan
STORAGES = {
    "transposed": lambda x, other=NAN: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every second row": lambda x, other=NAN: torch.stack([x, torch.full_like(x, other)], 1).flatten(0, 1)[::2],
    "every second column": lambda x, other=NAN: torch.stack([x, torch.full_like(x, other)], -1).flatten(-2)[..., ::2],
    "slice of wider rows": lambda x, other=NAN: torch.cat([x, torch.full_like(x, other)], -1)[..., : x.shape[-1]],
    "one row": lambda x, other=NAN: x[:1].expand_as(x),
    "one column": lambda x, other=NAN: x[..., :1].expand_as(x),
}


@backends
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", ["hidden", "head", "ref_hidden", "ref_head", "labels"])
def test_strides_do_not_matter(backend: str, storage: str, name: str):
    """Of a leaf that is itself a view with a stride of 0, the gradient is whole too."""
    call = ragged_batch()
    other = {"other": V + 9} if name == "labels" else {}
    changed = STORAGES[storage](call[name].detach(), **other).detach()
    results = []
    for x in (changed, changed.contiguous()):
        given = call | {name: x.requires_grad_(name in ("hidden", "head"))}
        out = fused_tdpo_loss(**given, backend=backend)
        results.append((out, grads(out.loss, given["hidden"], given["head"])))
    assert not changed.is_contiguous()
    fields_equal(results[0][0], results[1][0])
    close(results[0][1], results[1][1])


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
