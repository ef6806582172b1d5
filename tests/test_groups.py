"""A trained head's loss a group of pairs at a time: the numbers of all rows as one, for 4 products at little memory."""

from __future__ import annotations

import pytest
import torch
from batches import EVERYTHING, VARIANTS, batch, headed, trained
from closeness import same_bits
from runnable import runnable
from seeing import Ledger, Products
from torch._subclasses.fake_tensor import FakeTensorMode

from tdpo_kernels import LMHead, api, directions, fused_tdpo_loss, groups, op, token_stats
from tdpo_kernels.backends import grid, rowmath, tiled
from tdpo_kernels.types import Needs

ROW = 2 * 48 * 8  # bytes of a row's float64 logits, of 37 columns


pytestmark = pytest.mark.usefixtures("short_blocks")


def grouped(call: dict, budget: int, expected: bool = True, **options):
    """Return output and leaves of a call that is known to go by groups, or not to."""
    call, leaves = trained(call)
    seen = []
    real = groups.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api.groups, "run", lambda *a: seen.append(a[1]) or real(*a))
        out = fused_tdpo_loss(**call, memory_budget=budget, **options)
    assert bool(seen) == expected
    return out, leaves, seen


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [name for name in runnable() if name != "naive"])  # which keeps everything
def test_groups_are_all_rows_as_one(dtype: torch.dtype, options: dict, packed: bool, backend: str):
    call, eps = headed(dtype, packed), torch.finfo(dtype).eps
    apart = 4 * 37 * 8 if dtype == torch.bfloat16 else 0  # bytes of a sum of dW
    budget = 15 * ROW // (1 if dtype == torch.float64 else 2) + apart
    out, leaves, _ = grouped(call, budget, backend=backend, **options)
    want, want_leaves, _ = grouped(call, EVERYTHING, expected=False, backend=backend, **options)
    torch.testing.assert_close(out.loss, want.loss, rtol=8 * torch.finfo(out.loss.dtype).eps, atol=0)
    for name in ("logp", "ref_logp", "kl"):
        torch.testing.assert_close(getattr(out.tokens, name), getattr(want.tokens, name), rtol=1e-4, atol=1e-5)
    for x, y in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(want.loss, want_leaves), strict=True):
        assert x.dtype == dtype and (x - y).double().norm() <= 16 * eps * y.double().norm()


def test_groups_make_no_logits_twice_and_a_pair_that_does_not_fit_only_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(directions.LEAST, "cpu", 3)
    call = headed()
    D, E, V = call["hidden"].shape[-1], call["ref_hidden"].shape[-1], len(call["head"].weight)
    counts = (call["labels"][:, 1:] != -100).sum(1)
    pairs = counts[:3] + counts[3:]

    def flops(budget: int) -> float:
        with Products() as products:
            out, leaves, _ = grouped(call, budget)
            torch.autograd.grad(out.loss, leaves)
        return products.flops / (2 * V)

    once = int(counts.sum()) * (3 * D + E)
    assert flops(int(pairs.max()) * ROW) == once
    call["labels"][[1, 2, 4, 5], 5:] = -100
    counts = (call["labels"][:, 1:] != -100).sum(1)
    small, large = sorted((counts[:3] + counts[3:]).tolist())[1:]
    once = int(counts.sum()) * (3 * D + E)
    assert small < large and once < flops(small * ROW) <= once + large * (D + E)


@pytest.mark.parametrize("budget, why", [(6 * ROW, "too few rows"), (EVERYTHING, "everything is kept")])
def test_all_rows_go_as_one_where(budget: int, why: str):
    assert grouped(headed(), budget, expected=False)[0].loss.isfinite(), why


def test_losses_per_pair_fp16_frozen_heads_and_forwards_without_grad_are_not_grouped():
    grouped(headed(), 15 * ROW, expected=False, reduction="none")
    grouped(headed(torch.float16), 15 * ROW, expected=False)
    with torch.no_grad():
        grouped(headed(), 15 * ROW, expected=False)


def test_nothing_is_grouped_while_a_graph_is_traced_or_captured(monkeypatch: pytest.MonkeyPatch):
    """Only CUDA tensors are captured, for which fake ones stand in."""
    call, leaves = trained(headed())
    monkeypatch.setattr(groups, "run", lambda *_: pytest.fail("a group was made"))
    step = torch.compile(lambda call: fused_tdpo_loss(**call, memory_budget=15 * ROW).loss, backend="eager")
    assert all(x.any() for x in torch.autograd.grad(step(call), leaves))
    options = dict(ignore_index=-100, shift=True, cu_seqlens=None, extras=(), backend="tiled", memory_budget=15 * ROW)
    with FakeTensorMode():
        x, w, labels = torch.empty(6, 9, 8, device="cuda"), torch.empty(37, 8, device="cuda"), torch.empty(6, 9)
        model = op.Model(x, LMHead(w), x.dtype)
        seen = op.Call(model, model, labels, needs=Needs(True, True, False), **options)
        for capturing in (False, True):
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
            assert (groups.most_rows(seen, 7) is None) == capturing


def test_many_tiny_pairs_make_groups_of_many_rows():
    counts = [8] * 1024
    for most in (256, 546, 4096):
        sizes = [sum(counts[g]) + sum(counts[g.start + 512 : g.stop + 512]) for g in groups._groups(counts, most)]
        assert sum(sizes) == 8192 and all(most - 16 < n <= most for n in sizes[:-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_groups_stay_within_budget_and_workspace(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, small_tiles):
    """Law 4. The fp32 sum of a 16-bit dW is part of the budget; a group's fp32 dh comes on top."""
    small_tiles(64, 256)
    monkeypatch.setitem(grid.WORKSPACE, "cpu", 2**20)
    monkeypatch.setitem(directions.LEAST, "cpu", 64)
    call = batch(dtype, rows=32, length=32, D=512, V=1024)
    budget, gradients = (96 * 2 * 1024 + 1024 * 512) * 4, 2 * 1024 * 512 * dtype.itemsize
    call |= {n: call[n].detach() for n in ("hidden", "head", "ref_hidden", "ref_head")}
    with Ledger() as seen:
        out, leaves, _ = grouped(call | {"head": LMHead(call["head"])}, budget)
        torch.autograd.grad(out.loss, leaves)
    leaves_too, dh = gradients, budget // (2 * 1024 * 4) * 512 * 4
    assert seen.peak <= budget + 2**20 + gradients + leaves_too + dh


def test_rows_of_a_block_that_spare_a_softmax_have_the_bits_they_would_have(
    monkeypatch: pytest.MonkeyPatch, small_tiles
):
    small_tiles(128, 64)
    call = batch(torch.float32, rows=4, length=32, D=8, V=97)
    g_logp, g_kl = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    g_kl[:40], g_kl[40:80] = 0.0, g_logp[40:80]  # DPO's rows, TDPO1's, and others
    spared, real = [], rowmath.dz_from_one_
    monkeypatch.setattr(rowmath, "dz_from_one_", lambda x, m, *more: (spared.append((len(x), m)), real(x, m, *more)))
    found = []
    for run_of in (32, 1000):
        monkeypatch.setattr(tiled, "RUN", run_of)
        stats = token_stats(**call, backend="tiled")
        values = stats.logp.flatten(), stats.kl.flatten()
        found.append(torch.autograd.grad(values, (call["hidden"], call["head"]), (g_logp, g_kl)))
    assert spared == 2 * [(40, 0), (40, 1)] and same_bits(*found)
