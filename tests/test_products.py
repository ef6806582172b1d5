"""Products: by whose kernel they are made changes no number beyond rounding, and nothing outside the call."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tdpo_kernels import LMHead, token_stats
from tdpo_kernels.backends import products

SHAPES = [(1, 1, 1), (7, 33, 5), (64, 100, 64), (128, 96, 1024)]
UNCACHED = (products.mkl_is_held_back, products.onednn_linear)


@pytest.fixture(autouse=True)
def _forget():
    """What is found out about the machine is found out anew before and after a test that changes it."""
    for question in UNCACHED:
        question.cache_clear()
    yield
    for question in UNCACHED:
        question.cache_clear()


@pytest.fixture(params=["onednn", "torch.mm"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "onednn" and products.onednn_linear() is None:
        pytest.skip("this torch has no oneDNN linear")
    monkeypatch.setattr(products, "mkl_is_held_back", lambda: request.param == "onednn")
    monkeypatch.setattr(products, "ONEDNN_LEAST", 1)
    return request.param


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return products.logits_(hidden.new_full((hidden.shape[0], weight.shape[0]), torch.nan), hidden, weight)


# --- one product -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("R, C, D", SHAPES)
def test_all_three_products_against_float64(R: int, C: int, D: int, kernel: str):
    h, W, dz = torch.randn(R, D), torch.randn(C, D), torch.randn(R, C)
    assert relative(logits(h, W), h.double() @ W.double().T) < 1e-6
    for a, b in ((dz, W), (dz.T, h)):
        acc = torch.full((a.shape[0], b.shape[1]), torch.nan)
        products.accumulate_(acc, a, b, 0.5, keep=0)
        products.accumulate_(acc, a, b, 2.0)
        assert relative(acc, 2.5 * (a.double() @ b.double())) < 1e-6


def test_the_same_to_the_bit_again_and_from_any_layout(kernel: str):
    h, W = torch.randn(96, 200), torch.randn(80, 200)
    first = logits(h, W)
    assert torch.equal(first, logits(h, W))
    acc = torch.empty(80, 96)
    products.accumulate_(acc, W.T.contiguous().T, h.T, 1.0, keep=0)
    again = torch.empty(80, 96)
    products.accumulate_(again, W, h.T.contiguous(), 1.0, keep=0)
    assert relative(acc, again) < 1e-6 and relative(acc, first.T) < 1e-6


def test_nothing_to_sum_is_zero(kernel: str):
    assert torch.equal(logits(torch.empty(3, 0), torch.empty(5, 0)), torch.zeros(3, 5))


def test_inf_and_nan_come_through(kernel: str):
    h, W = torch.randn(8, 40), torch.randn(33, 40)
    h[1, 3], h[2, 3], W[5, 7], W[6] = torch.inf, torch.nan, -torch.inf, 0.0
    for got, want in zip((x := logits(h, W)).isnan() | x.isinf(), ~torch.mm(h, W.T).isfinite(), strict=True):
        assert torch.equal(got, want)


def test_float64_stays_with_torch(kernel: str):
    h, W = torch.randn(9, 12, dtype=torch.float64), torch.randn(10, 12, dtype=torch.float64)
    assert torch.equal(logits(h, W), torch.mm(h, W.T))


# --- by whom ---------------------------------------------------------------------------------------------------------


def made_by_mm(h: Tensor, W: Tensor, monkeypatch: pytest.MonkeyPatch) -> bool:
    calls, mm = [], torch.mm
    monkeypatch.setattr(products.torch, "mm", lambda *a, **k: (calls.append(1), mm(*a, **k))[1])
    found = logits(h, W)
    monkeypatch.setattr(products.torch, "mm", mm)
    assert relative(found, h.double() @ W.double().T) < 1e-6
    return bool(calls)


def test_torch_makes_the_product_where_the_private_op_is_gone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "mkl_is_held_back", lambda: True)
    monkeypatch.setattr(products.torch.ops, "mkldnn", SimpleNamespace())
    assert products.onednn_linear() is None
    assert made_by_mm(torch.randn(20, 30), torch.randn(40, 30), monkeypatch)


def test_torch_makes_the_product_where_the_user_switched_onednn_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "mkl_is_held_back", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert made_by_mm(torch.randn(20, 30), torch.randn(40, 30), monkeypatch)


@pytest.mark.parametrize(
    "vendor, capability, held_back",
    [("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False)],
)
def test_onednn_is_for_where_mkl_keeps_to_avx2(vendor: str, capability: str, held_back: bool, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(products, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(products.torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(products.torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products.mkl_is_held_back() is held_back


def test_without_mkl_torch_makes_the_products(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products.torch.backends.mkl, "is_available", lambda: False)
    assert not products.mkl_is_held_back()


# --- other threads ---------------------------------------------------------------------------------------------------


def test_threads_leave_the_process_s_precision_alone_and_disturb_nobody(kernel: str):
    """The switch used to be thrown around every bf16 product; two threads at once left it thrown for good."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None:
        pytest.skip("this torch has no torch.backends.mkldnn.matmul")
    before, seen, wrong = matmul.fp32_precision, set(), []
    hidden, weight = (torch.randn(64, 64).bfloat16().float() for _ in range(2))
    want = hidden.double() @ weight.double().T

    def work() -> None:
        for _ in range(300):
            out = logits(hidden, weight)
            seen.add(matmul.fp32_precision)
            if relative(out, want) > 1e-6:
                wrong.append(out)

    threads = [threading.Thread(target=work) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert matmul.fp32_precision == before and seen == {before} and not wrong
    finally:
        matmul.fp32_precision = before


# --- bf16 gradients --------------------------------------------------------------------------------------------------


def kl_gradients(hidden: Tensor, weight: Tensor, ref_bias: Tensor, budget: int) -> list[Tensor]:
    ref_head = LMHead(weight, ref_bias)
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    labels = torch.zeros(1, hidden.shape[0], dtype=torch.long)
    models = dict(hidden=hidden[None], head=LMHead(weight), ref_hidden=hidden[None].detach(), ref_head=ref_head)
    kl = token_stats(**models, labels=labels, shift=False, backend="tiled", memory_budget=budget).kl
    return list(torch.autograd.grad(kl.sum(), (hidden, weight)))


@pytest.mark.parametrize("budget", [0, 2**30], ids=["recomputed", "staged"])
def test_bf16_gradients_survive_tiles_that_cancel(budget: int, small_tiles, kernel: str):
    """Every row of W has a component in common, and half of the tiles gain what the others lose. What a tile adds to
    dh along that component is large, and sums to nothing: rounded to bf16 tile by tile it left an error of several
    percent. Rounding dz, as the backward of `F.linear` does, is all that may be lost."""
    small_tiles(16, 512)
    V, D, T = 4096, 64, 32
    hidden, common = torch.randn(T, D), torch.randn(D)
    weight = torch.randn(V, D) / D**0.5 + 3 * common
    ref_bias = torch.randn(V // 512).repeat_interleave(512)
    models = [x.bfloat16() for x in (hidden, weight, ref_bias)]
    h, W, bias = (x.double() for x in models)
    dz = (h @ W.T).softmax(-1) - (h @ W.T + bias).softmax(-1)
    rounded = dz.bfloat16().double()
    for found, truth, best in zip(
        kl_gradients(*models, budget), (dz @ W, dz.T @ h), (rounded @ W, rounded.T @ h), strict=True
    ):
        assert relative(found, truth) <= 2 * relative(best, truth) + 4e-3


def test_products_that_cancel_leave_what_they_should(kernel: str):
    a, b, small = torch.randn(16, 64).bfloat16(), torch.randn(64, 32).bfloat16(), torch.randn(64, 32).bfloat16() / 128
    grad = torch.empty(16, 32, dtype=torch.bfloat16)
    dtype = products.operand_dtype(torch.bfloat16, torch.float32, a.device)
    total = products.GradientSum(grad, None, torch.float32, held=16)
    for left, right in ((a, b), (a, small), (-a[:, :32], b[:32]), (-a[:, 32:], b[32:])):
        total.add(slice(0, 16), left.to(dtype), right.to(dtype), 1.0)
    total.close(slice(0, 16))
    assert relative(total.grad, a.double() @ small.double()) < 4e-3
