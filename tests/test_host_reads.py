"""Count how often the host waits for the device: once, in `pack`, and only where values decide."""

from __future__ import annotations

import sys

import pytest
import torch
from batches import batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tdpo_kernels import token_stats
from tdpo_kernels.pack import pack


class HostReads(TorchDispatchMode):
    """Note what makes the host wait for a CUDA device: values read, and shapes that depend on values."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.seen: list[str] = []
        for name in ("tolist", "item", "__bool__", "__int__", "__index__", "__float__", "numpy"):
            monkeypatch.setattr(Tensor, name, self._noting(name, getattr(Tensor, name)))

    def _noting(self, name: str, method):
        def noted(x: Tensor, *args):
            if not sys._getframe(1).f_code.co_filename.endswith("rowmath.py"):  # which looks at tiles on a CPU only
                self.seen.append(name)
            with torch.utils._python_dispatch._disable_current_modes():
                return method(x, *args)

        return noted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [x for x in (args[1] if name in ("index", "index_put", "index_put_") else ()) if x is not None]
        if name in ("nonzero", "masked_select", "_local_scalar_dense", "equal", "unique_dim", "_unique2") or any(
            x.dtype == torch.bool for x in masks
        ):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("ignored", [False, True], ids=["all rows", "some rows"])
def test_a_call_reads_the_device_once(packed: bool, shift: bool, ignored: bool, monkeypatch: pytest.MonkeyPatch):
    """All of it in `pack`."""
    call = batch() | {"shift": shift}
    if ignored:
        call["labels"][:, 1] = -100
    if packed:
        call |= {n: call[n].detach().flatten(0, 1) for n in ("hidden", "ref_hidden", "labels")}
        call["cu_seqlens"] = torch.tensor([0, 3, 6, 9, 12])
    with HostReads(monkeypatch) as reads:
        token_stats(**call, backend="naive")
    assert reads.seen == ["tolist"]


@pytest.mark.parametrize("shift", [False, True])
def test_padded_rows_that_all_count_need_no_read(shift: bool, monkeypatch: pytest.MonkeyPatch):
    """On a CPU the range of the labels is read all the same: looking is free there."""
    labels = batch()["labels"]
    with HostReads(monkeypatch) as reads:
        rows = pack(Elsewhere(labels), None, 19, ignore_index=None, shift=shift)
    assert reads.seen == []
    want = pack(labels, None, 19, ignore_index=None, shift=shift)
    for got, also in ((rows.hidden_T, want.hidden_T), (rows.label_T, want.label_T), (rows.labels_T, want.labels_T)):
        assert got is also is None or torch.equal(got, also)


class Elsewhere(Tensor):
    """A tensor that says it is not on a CPU."""

    @staticmethod
    def __new__(cls, x: Tensor) -> Elsewhere:
        return x.as_subclass(cls)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")
