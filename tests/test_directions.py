"""A frozen head: dh along directions that forward made is what a trainable head's backward makes, for 3 products."""

from __future__ import annotations

import pytest
import torch
from batches import VARIANTS, headed
from cases import DTYPES
from seeing import Products
from torch import Tensor
from truth import exact

from tdpo_kernels import LMHead, fused_tdpo_loss

pytestmark = pytest.mark.usefixtures("short_blocks")


def gradient(call: dict, frozen: bool, upstream: float = 1.0, **options) -> tuple[Tensor, Tensor]:
    """Return the loss and dh, of a head that is frozen or, else, trained."""
    head, hidden = call["head"], call["hidden"].detach().clone().requires_grad_()
    weight = head.weight.clone().requires_grad_(not frozen)
    out = fused_tdpo_loss(**call | {"hidden": hidden, "head": LMHead(weight, head.bias, 1.3, 20.0)}, **options)
    return out.loss.detach(), torch.autograd.grad(out.loss.sum() * upstream, hidden)[0]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frozen_head_s_gradient_is_the_trained_one_s(dtype: torch.dtype, options: dict, packed: bool, backend: str):
    call, eps = headed(dtype, packed), torch.finfo(dtype).eps
    for budget in (0, 5000, 2**40):
        given = options | dict(memory_budget=budget, backend=backend)
        (loss, along), (want, dh) = (gradient(call, frozen, **given) for frozen in (True, False))
        torch.testing.assert_close(loss, want, rtol=8 * torch.finfo(loss.dtype).eps, atol=0)
        assert (along - dh).double().norm() <= 8 * eps * dh.double().norm()
        assert not exact(along)[exact(dh) == 0].any(), "a row that predicts nothing has a gradient"


@pytest.mark.parametrize("budget, most", [(2**40, 3.0), (2 * 7 * 48 * 8, 3.0), (0, 5.0)])
def test_logits_that_fit_by_the_block_are_made_once(budget: int, most: float):
    """G is one product of 2 T V D; three are the floor. At budget 0 a block's logits are made again."""
    call = headed()
    head, T = call["head"].weight, (call["labels"][:, 1:] != -100).sum().item()
    forward, backward = 2 * T * len(head) * (call["hidden"].shape[-1] + call["ref_hidden"].shape[-1]), 0
    with Products() as products:
        gradient(call, frozen=True, memory_budget=budget)
    backward = 2 * T * len(head) * call["hidden"].shape[-1]
    assert products.flops <= (forward + backward) * most / 3
    assert budget == 0 or products.flops == forward + backward


def test_nothing_of_it_happens_without_a_gradient():
    call = headed()
    with Products() as without, torch.no_grad():
        fused_tdpo_loss(**call)
    with Products() as with_gradient:
        gradient(call, frozen=True)
    assert without.flops < with_gradient.flops
