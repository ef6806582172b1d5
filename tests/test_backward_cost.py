"""Nothing that nobody wants, and no product more than DESIGN's count."""

from __future__ import annotations

import pytest
import torch
from batches import EVERYTHING, batch
from seeing import Ledger, Products
from torch import Tensor

from tdpo_kernels import LMHead, fused_tdpo_loss, token_stats

# --- nothing that nobody wants ----------------------------------------------------------------------------------------


def backward_flops(wanted: tuple[str, ...], budget: int) -> tuple[float, dict]:
    """GEMM flops of a backward in units of G, with `wanted` requiring gradients."""
    call = batch(torch.float32, length=16, D=8, V=64)
    parts = {"hidden": call["hidden"], "weight": call["head"], "bias": torch.linspace(-1, 1, 64)}
    parts = {n: x.detach().requires_grad_(n in wanted) for n, x in parts.items()}
    heads = {"hidden": parts["hidden"], "head": LMHead(parts["weight"], parts["bias"])}
    stats = token_stats(**call | heads, memory_budget=budget)
    with Products() as gemms:
        (stats.logp - 3 * stats.kl).sum().backward()
    return gemms.flops / (2 * 64 * 64 * 8), parts


@pytest.mark.parametrize(
    "wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("hidden", "weight", "bias")], ids=str
)
@pytest.mark.parametrize("budget, recompute", [(EVERYTHING, 0), (0, 2)])
def test_frozen_parts_cost_nothing(wanted: tuple[str, ...], budget: int, recompute: int):
    units, parts = backward_flops(wanted, budget)
    assert units == recompute + len(set(wanted) - {"bias"})
    assert all((x.grad is not None) == (n in wanted) for n, x in parts.items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, None], ids=["no_grad", "inference", "frozen"])
def test_nothing_is_kept_without_a_gradient(mode, small_tiles):
    small_tiles(16, 16)
    call = batch(torch.float32, length=64, V=256)
    if mode is None:
        call |= {n: call[n].detach() for n in ("hidden", "head")}
    with Ledger() as kept:
        want = fused_tdpo_loss(**call, memory_budget=EVERYTHING).loss
    with Ledger() as nothing, (mode or torch.enable_grad)():
        loss = fused_tdpo_loss(**call, memory_budget=EVERYTHING).loss
    assert torch.equal(loss, want) and not loss.requires_grad
    assert loss.is_inference() == (mode is torch.inference_mode)
    assert nothing.largest < 64 * 1024 and (mode is None or kept.largest >= 2 * 4 * 256 * 256)


# --- what a backward costs, section 4 ---------------------------------------------------------------------------------


T, WIDTH, VOCAB = 32, 8, 64
G = 2 * T * VOCAB * WIDTH


@pytest.fixture
def half_and_half(small_tiles) -> None:
    """Row blocks of 16: the chosen rows are one, the rejected the other."""
    small_tiles(16, 16)


def cost(objective, budget: int, head=lambda w: w) -> tuple[float, float]:
    """Forward and backward GEMM flops in units of G."""
    call = batch(torch.float32, rows=2, length=16, D=WIDTH, V=VOCAB) | {"memory_budget": budget}
    call["head"] = head(call["head"])
    with Products() as forward:
        loss = objective(call)
    with Products() as backward:
        loss.backward()
    return forward.flops / G, backward.flops / G


def fused(**options):
    return lambda call: fused_tdpo_loss(**call, **options).loss


def weighted(g_logp: Tensor | None, g_kl: Tensor | None):
    def objective(call: dict) -> Tensor:
        stats = token_stats(**call)
        pairs = ((stats.logp, g_logp), (stats.kl, g_kl))
        return sum((x * g).sum() for x, g in pairs if g is not None)

    return objective


ROWS = torch.arange(1.0, T + 1).view(2, 16)
FIRST_HALF = ROWS * torch.tensor([[1.0], [0.0]])
COSTS = {
    "dpo": (fused(alpha=0.0), 1.0, 2.0),
    "tdpo1": (fused(variant="tdpo1"), 1.0, 2.0),
    "tdpo2": (fused(alpha=0.5), 1.5, 2.0),
    "general": (weighted(ROWS, -ROWS), 2.0, 2.0),
    "logp only": (weighted(ROWS, None), 1.0, 2.0),
    "kl only": (weighted(None, ROWS), 2.0, 2.0),
    "equal": (weighted(ROWS, ROWS), 1.0, 2.0),
    "half the rows, logp": (weighted(FIRST_HALF, None), 0.5, 1.0),
    "half the rows, both": (weighted(FIRST_HALF, -FIRST_HALF), 1.0, 1.0),
    "no row": (weighted(0 * ROWS, 0 * ROWS), 0.0, 0.0),
}


@pytest.mark.parametrize("objective, recompute, products", COSTS.values(), ids=COSTS)
def test_backward_recomputes_what_its_rows_need_and_no_more_and_of_what_is_kept_nothing(
    objective, recompute: float, products: float, half_and_half
):
    assert cost(objective, 0) == (2.0, recompute + products)
    assert cost(objective, EVERYTHING) == (2.0, products)


def test_half_a_budget_is_half_a_recomputation(half_and_half):
    tile = int(2 * 16 * 16 * 4 * 1.12)  # both models' logits, and a few numbers per row
    assert [cost(fused(variant="tdpo1"), n * tile)[1] for n in (0, 2, 4, 8)] == [3.0, 2.75, 2.5, 2.0]


def test_softcap_costs_tdpo1_the_policy_s_logits(half_and_half):
    """Its slope needs z, whatever else is needed."""
    softcapped = {"head": lambda w: LMHead(w, softcap=5.0)}
    assert cost(fused(variant="tdpo1"), 0, **softcapped) == (2.0, 4.0)
    assert cost(fused(alpha=0.0), 0, **softcapped) == (2.0, 3.0)
    assert cost(fused(variant="tdpo1"), EVERYTHING, **softcapped) == (2.0, 2.0)


def test_ignored_rows_cost_nothing(half_and_half):
    call = batch(torch.float32, rows=2, length=32, D=WIDTH, V=VOCAB)
    call["labels"][:, ::2] = -100
    with Products() as gemms:
        fused_tdpo_loss(**call, memory_budget=EVERYTHING).loss.backward()
    assert gemms.flops == 4 * G
