"""Products of 16 bits into fp32 as devices have them, by stand-ins for torch's: in one call, in two, or not at all."""

from __future__ import annotations

import pytest
import torch
from batches import batch, grads
from torch import Tensor

from tdpo_kernels import fused_tdpo_loss
from tdpo_kernels.backends import logits

CPU = torch.device("cpu")


class Device:
    """Stand in for torch on a device that has some of the mixed products, and count them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, has: set[str]) -> None:
        self.has, self.calls, self.plain = has, [], {"addmm": torch.addmm, "mm": torch.mm}
        for name in self.plain:
            monkeypatch.setattr(torch, name, self.made(name))
        monkeypatch.setattr(logits, "operand_dtype", self.operand_dtype)
        logits.mixed.cache_clear()

    def made(self, name: str):
        def product(*operands: Tensor, out_dtype: torch.dtype | None = None, **options) -> Tensor:
            if out_dtype is None:
                return self.plain[name](*operands, **options)
            if name not in self.has:
                raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")
            self.calls.append((name, options.get("beta")))
            return self.plain[name](*(x.to(out_dtype) for x in operands), **options)

        product.__name__ = name
        return product

    def operand_dtype(self, compute: torch.dtype, stats: torch.dtype, device: torch.device) -> torch.dtype:
        return compute if logits.mixed(device, compute) else stats


@pytest.fixture(autouse=True)
def probed_anew():
    yield
    logits.mixed.cache_clear()


DEVICES = [({"addmm", "mm"}, "addmm"), ({"mm"}, "mm"), (set(), "")]


@pytest.mark.parametrize("has, wanted", DEVICES)
def test_a_device_is_asked_once(has: set[str], wanted: str, monkeypatch: pytest.MonkeyPatch):
    device = Device(monkeypatch, has)
    assert [logits.mixed(CPU, torch.bfloat16) for _ in range(3)] == [wanted] * 3
    assert len(device.calls) == bool(has)


def test_an_older_torch_has_no_such_argument(monkeypatch: pytest.MonkeyPatch):
    def product(*operands: Tensor, out: Tensor | None = None) -> Tensor: ...

    monkeypatch.setattr(torch, "addmm", product)
    monkeypatch.setattr(torch, "mm", product)
    logits.mixed.cache_clear()
    assert logits.mixed(CPU, torch.float16) == ""


@pytest.mark.parametrize("has", [has for has, _ in DEVICES], ids=lambda has: "+".join(sorted(has)) or "none")
@pytest.mark.parametrize("trainable", [True, False], ids=["", "frozen head"])
def test_the_numbers_are_those_of_widened_operands(has, trainable, small_tiles, monkeypatch: pytest.MonkeyPatch):
    """Made from the same 16 bits, summed in fp32: the order of sums may differ, and nothing else."""
    results, leaves = [], ("hidden", "head") if trainable else ("hidden",)
    for there in (None, has):
        device = None if there is None else Device(monkeypatch, there)
        call = batch(torch.bfloat16, rows=8, length=9, D=16, V=150)
        call["head"].requires_grad_(trainable)
        loss = fused_tdpo_loss(**call, backend="tiled", memory_budget=0).loss
        results.append([loss.detach(), *grads(loss, *(call[name] for name in leaves))])
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5 if want.dtype == torch.float32 else 2**-7, atol=1e-7)
    made = {name for name, _ in device.calls}
    assert made == ({"addmm"} if "addmm" in has else has)
    assert "addmm" not in has or {beta for _, beta in device.calls[1:]} == {0, 1}


def test_a_cpu_is_never_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logits, "mixed", lambda *_: pytest.fail("asked"))
    assert logits.operand_dtype(torch.bfloat16, torch.float32, CPU) == torch.float32
    assert logits.operand_dtype(torch.float64, torch.float64, torch.device("cuda")) == torch.float64
