"""Law 6: bugs that users of neighbours reported, each a test here. DDP is in `test_ways.py`, heads that FSDP2 shards in
`test_parallel_errors.py`, LoRA on the head in `test_errors.py` and `examples/test_demo.py`."""

from __future__ import annotations

import math
from functools import partial

import batches
import pytest
import torch
from batches import EVERYTHING, close, reference_stats
from runnable import backends
from torch import Tensor, nn

from tdpo_kernels import LMHead, fused_tdpo_loss, token_stats

budgets = pytest.mark.parametrize("budget", [0, EVERYTHING])


@pytest.fixture(autouse=True)
def _tiles(small_tiles) -> None:
    small_tiles(4, 16)


batch = partial(batches.batch, rows=2, length=6, D=8, V=37)


def plain(call: dict) -> tuple[Tensor, Tensor, Tensor]:
    stats = reference_stats(call)
    return stats.logp, stats.ref_logp, stats.kl


def padded_head(weight: Tensor, rows: int, fill: float) -> LMHead:
    """`rows` zero rows more, masked by a bias of `fill` there."""
    weight = torch.cat([weight, weight.new_zeros(rows, weight.shape[1])])
    bias = weight.new_zeros(len(weight))
    bias[len(bias) - rows :] = fill
    return LMHead(weight, bias)


@backends
@budgets
@pytest.mark.parametrize("rows", [1, 11, 40])
@pytest.mark.parametrize("fill", [-math.inf, -1e4])
def test_padded_vocabulary_masked_by_its_bias_is_none(backend: str, budget: int, rows: int, fill: float):
    """verl #5349, Liger's distillation: phantom rows take probability."""
    call = batch()
    options = dict(backend=backend, memory_budget=budget)
    masked = {name: padded_head(call[name], rows, fill) for name in ("head", "ref_head")}
    a, b = token_stats(**call, **options), token_stats(**call | masked, **options)
    close((b.logp, b.ref_logp, b.kl), (a.logp, a.ref_logp, a.kl))
    leaves = call["hidden"], call["head"]
    g_a, g_b = (torch.autograd.grad((s.logp - 2 * s.kl).sum(), leaves) for s in (a, b))
    close(g_b, g_a)


@backends
@pytest.mark.parametrize("as_linear", [True, False])
def test_bias_is_honoured_in_values_and_gradients(backend: str, as_linear: bool):
    """CCE #52: a bias that is silently ignored."""
    call = batch()
    linear = nn.Linear(8, 37).double()
    nn.init.normal_(linear.bias)
    head = linear if as_linear else LMHead(linear.weight, linear.bias)
    got = token_stats(**call | {"head": head}, backend=backend)
    logp, _, kl = plain(call | {"head": LMHead(linear.weight, linear.bias)})
    close((got.logp, got.kl), (logp, kl))
    leaves = linear.weight, linear.bias
    close(torch.autograd.grad((got.logp + got.kl).sum(), leaves), torch.autograd.grad((logp + kl).sum(), leaves))
    assert (got.logp - token_stats(**call | {"head": linear.weight}, backend=backend).logp).abs().min() > 1e-6


@backends
@budgets
def test_cotangents_may_differ_from_token_to_token(backend: str, budget: int):
    """Liger #1298: gradients made in the forward with one scalar in mind are wrong under per-token weights."""
    call = batch()
    leaves = call["hidden"], call["head"]
    u, v = torch.randn(2, 2, 6, dtype=torch.float64)
    u[0, 0], v[1, 2], u[1, 3], v[1, 3] = 0, 0, 1e6, -1e-6
    stats, (logp, _, kl) = token_stats(**call, backend=backend, memory_budget=budget), plain(call)
    got = torch.autograd.grad([stats.logp, stats.kl], leaves, [u, v])
    close(got, torch.autograd.grad([logp, kl], leaves, [u, v]), 1e-9)


@backends
@budgets
@pytest.mark.parametrize("gap", [104.0, 1e3, 1e5])
@pytest.mark.parametrize("who", ["hidden", "ref_hidden", "both"])
def test_a_logit_gap_of_104_is_no_nan(backend: str, budget: int, gap: float, who: str):
    """Take a token at e^-104, which is 0 in fp32: softmax().log() is -inf, and its product with 0 is NaN."""
    call = batch(torch.float32, D=2, V=20)
    call |= {"head": torch.zeros(20, 2), "ref_head": torch.zeros(20, 2)}
    call["head"][0, 0] = call["ref_head"][0, 0] = 1.0
    call["head"].requires_grad_()
    peaked, flat = torch.zeros(2, 6, 2), torch.zeros(2, 6, 2)
    peaked[..., 0] = gap
    call["hidden"] = (flat if who == "ref_hidden" else peaked).clone().requires_grad_()
    call["ref_hidden"] = flat if who == "hidden" else peaked
    stats = token_stats(**call, backend=backend, memory_budget=budget)
    exact = {n: call[n].detach().double() for n in ("hidden", "head", "ref_hidden", "ref_head")}
    logp, ref, kl = plain(call | exact)
    close((stats.logp.double(), stats.ref_logp.double(), stats.kl.double()), (logp, ref, kl), 1e-5)
    grads = torch.autograd.grad((stats.logp - stats.kl).sum(), (call["hidden"], call["head"]))
    assert all(g.isfinite().all() for g in grads)


@backends
@budgets
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nan_in_a_masked_prompt_row_stays_there(backend: str, budget: int, dtype: torch.dtype):
    """NaN x 0 is NaN: a mask that multiplies does not mask."""
    call = batch(dtype)
    call["labels"][:, :3] = -100
    clean = fused_tdpo_loss(**call, backend=backend, memory_budget=budget)
    want = torch.autograd.grad(clean.loss, (call["hidden"], call["head"]))
    for name in ("hidden", "ref_hidden"):
        call[name] = call[name].detach().clone()
        call[name][:, :2], call[name][:, 2] = math.nan, math.inf
    call["hidden"].requires_grad_()
    out = fused_tdpo_loss(**call, backend=backend, memory_budget=budget)
    got = torch.autograd.grad(out.loss, (call["hidden"], call["head"]))
    assert torch.equal(out.loss, clean.loss)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert got[0][:, :3].eq(0).all()


@budgets
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("which", ["rows", "columns"])
def test_sixteen_bit_gradients_are_summed_in_fp32(budget: int, dtype: torch.dtype, which: str, small_tiles):
    """Liger #512 and #1472, Megatron #2739, xtuner #1747: 64 partial sums in bf16 lose what one fp32 sum keeps."""
    small_tiles(*((16, 2048) if which == "rows" else (2048, 16)))
    call = batch(dtype, rows=2, length=512 if which == "rows" else 32, V=64 if which == "rows" else 1024)
    call["hidden"] = (call["hidden"].detach().abs() * 0.1).requires_grad_()  # one sign: partial sums grow
    exact = {n: call[n].detach().double() for n in ("hidden", "head", "ref_hidden", "ref_head")}
    exact["hidden"].requires_grad_(), exact["head"].requires_grad_()
    logp, _, kl = plain(call | exact)
    index = 1 if which == "rows" else 0
    leaves = (call["hidden"], call["head"])[index], (exact["hidden"], exact["head"])[index]
    want = torch.autograd.grad((logp - kl).sum(), leaves[1])[0]
    stats = token_stats(**call, memory_budget=budget)
    got = torch.autograd.grad((stats.logp - stats.kl).sum(), leaves[0])[0]
    error = (got.double() - want).norm() / want.norm()
    assert error <= 2 * (want.to(dtype).double() - want).norm() / want.norm() + 2e-3


@budgets
def test_small_contributions_survive_behind_large_ones(budget: int, small_tiles):
    """Sum one block of large rows and 64 of small ones: in bf16 256 + 1 is 256, and only the first would be left."""
    small_tiles(16, 64)
    call = batch(torch.bfloat16, rows=1, length=16 * 65, D=4, V=2)
    hidden = torch.zeros(1, 16 * 65, 4)
    hidden[0, :16, 0], hidden[0, 16:, 0] = 16.0, 0.0625
    call |= {"hidden": hidden.bfloat16(), "head": torch.zeros(2, 4).bfloat16().requires_grad_()}
    call["labels"] = torch.zeros(1, 16 * 65).long()
    stats = token_stats(**call, memory_budget=budget)
    (g,) = torch.autograd.grad(stats.logp.sum(), call["head"])
    want = 0.5 * (16 * 16.0 + 64 * 16 * 0.0625)
    assert g[0, 0].item() == pytest.approx(want, rel=2**-8) and g[1, 0].item() == pytest.approx(-want, rel=2**-8)


EDGES = [0, 1, 15, 16, 17, 31, 32, 35, 36]


@backends
@budgets
@pytest.mark.parametrize("extra", [{}, {"softcap": 4.0}], ids=["plain", "softcap"])
def test_labels_at_every_edge_of_a_tile(backend: str, budget: int, extra: dict):
    """CCE #59: a label that equals the sentinel of "not in this tile"."""
    call = batch(length=len(EDGES))
    call["labels"] = torch.tensor([EDGES, EDGES[::-1]])
    capped = {n: LMHead(call[n], **extra) for n in ("head", "ref_head")}
    stats = token_stats(**call | capped, backend=backend, memory_budget=budget)
    logp, ref, kl = plain(call | capped)
    close((stats.logp, stats.ref_logp, stats.kl), (logp, ref, kl))
    leaves = call["hidden"], call["head"]
    for a, b in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, -0.5)):
        got = torch.autograd.grad((a * stats.logp + b * stats.kl).sum(), leaves, retain_graph=True)
        close(got, torch.autograd.grad((a * logp + b * kl).sum(), leaves, retain_graph=True))


@backends
@pytest.mark.parametrize("ignore_index", [15, 16, 36, 0, 37, -1])
def test_ignore_index_at_a_tile_s_edge_is_only_an_ignore_index(backend: str, ignore_index: int):
    call = batch()
    labels = torch.where(call["labels"] == ignore_index, 5, call["labels"])
    labels[:, 2] = -100
    a = fused_tdpo_loss(**call | {"labels": labels}, backend=backend)
    other = torch.where(labels == -100, ignore_index, labels)
    b = fused_tdpo_loss(**call | {"labels": other}, ignore_index=ignore_index, backend=backend)
    assert torch.equal(a.loss, b.loss)


def test_a_large_logit_scale_does_not_overflow_fp16_gradients(backend):
    g = torch.Generator().manual_seed(0)
    hidden, ref_hidden = (torch.randn(1, 9, 16, generator=g).half() for _ in range(2))
    weight = (torch.randn(40, 16, generator=g) / 64).half().requires_grad_()
    labels = torch.randint(40, (1, 9), generator=g)
    head = LMHead(weight, logit_scale=16.0)
    out = token_stats(hidden.requires_grad_(), head, ref_hidden, weight.detach(), labels, backend=backend)
    grads = torch.autograd.grad((out.logp + out.kl).sum(), [hidden, weight])
    assert all(x.isfinite().all() and x.count_nonzero() for x in grads)
