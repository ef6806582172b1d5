"""The products of CPUs that MKL holds back: the same numbers, and never of a matrix with gaps."""

from __future__ import annotations

import pytest
import torch
from batches import batch, grads

from tdpo_kernels import fused_tdpo_loss
from tdpo_kernels.backends import onednn


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Return the strides of every pair of matrices that oneDNN is given, as on such a CPU."""
    pairs, product = [], onednn.product
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    monkeypatch.setattr(onednn, "LEAST", 0)
    monkeypatch.setattr(onednn, "product", lambda a, b: pairs.append((a, b)) or product(a, b))
    return pairs


HEADS = {
    "contiguous": lambda w: w,
    "transposed": lambda w: torch.cat([w.t(), w.t()], 1)[:, : len(w)].t(),
    "column slice": lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
    "every other row": lambda w: w.repeat_interleave(2, 0)[::2],
}


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no such product")
@pytest.mark.parametrize("layout", HEADS)
def test_the_numbers_are_mkl_s(layout: str, seen: list[tuple], monkeypatch: pytest.MonkeyPatch):
    call = batch(torch.float32, length=16, D=8, V=48)
    head = HEADS[layout](call["head"].detach()).requires_grad_()
    results = []
    for enabled in (True, False):
        with torch.backends.mkldnn.flags(enabled=enabled):
            loss = fused_tdpo_loss(**call | {"head": head}).loss
            results.append([loss, *grads(loss, call["hidden"], head)])
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-7)
    assert seen and all(x.is_contiguous() or x.T.is_contiguous() for pair in seen for x in pair)
