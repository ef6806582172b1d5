"""What holds of all kernels, whatever they compute: programs that take turns, more than 2^31 elements."""

from __future__ import annotations

import mmap
import sys

import kernel_launches
import pytest
import torch
from exact_dz import made_backward
from exact_problems import made
from harness import F16, F32
from kernel_launches import fused_dz, fused_stats, planes, row_values, staged_dz, tile_dz, tile_stats, windows
from runnable import mainly
from torch import Tensor


@pytest.mark.parametrize("programs", mainly((2, 50), (1, 2, 5, 50)))
@pytest.mark.parametrize("name", mainly(("softcap",), ("plain", "softcap")))
def test_programs_that_take_turns_leave_the_same_bits(name, programs):
    """As many as there are tiles, fewer, or more; of all columns or from the middle of a tile on."""
    p, want = made(name), made_backward(name, "blocks")
    values = row_values(p)
    for cols in windows(p):
        one, other = (planes(p, cols[1] - cols[0], F16) for _ in range(2))
        states, again = fused_stats(p, one, cols), fused_stats(p, other, cols, programs=programs)
        assert torch.equal(states, again) and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
        dz, again = (fused_dz(p, values, want, cols, False, programs=n) for n in (None, programs))
        assert torch.equal(dz.nan_to_num(7.0), again.nan_to_num(7.0))


# --- more than 2^31 elements ------------------------------------------------------------------------------------------


MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # `mmap` has its name since Python 3.13


def far_apart(x: Tensor, _: int = 0) -> Tensor:
    """x, its last row 2^31 elements or more behind its first, in memory that is not there until it is touched, nor
    asked for: a small machine would not promise as much."""
    rows, cols = x.shape[-2:]
    stride = (2**31 // max(rows - 1, 1) // 16 + 1) * 16
    size = (rows - 1) * stride + x.shape[:-2].numel() * cols
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    room = torch.frombuffer(mmap.mmap(-1, size * x.itemsize, flags), dtype=x.dtype)
    return room.as_strided(x.shape, (*[cols] * (x.dim() - 2), stride, 1)).copy_(x)


def test_matrices_of_more_than_two_to_the_31_elements(monkeypatch):
    """Whatever is loaded, staged or written, by row: an offset in 32 bits would wrap around."""
    p, want, cols = made("softcap"), made_backward("softcap", "general"), (20, 70)
    values = row_values(p)

    def everything() -> list[Tensor]:
        staged = [kernel_launches.planes(p, cols[1] - cols[0], F32) for _ in range(2)]
        states = fused_stats(p, staged[0], cols), tile_stats(p, cols, staged[1])
        dz = fused_dz(p, values, want, cols, False), tile_dz(p, values, want, cols, True, True)
        return [*states, *staged, *dz, staged_dz(p, want, cols, F32)]

    near, build_planes, build_dz = everything(), kernel_launches.planes, kernel_launches.dz_of
    monkeypatch.setattr(kernel_launches, "strided", far_apart)
    monkeypatch.setattr(kernel_launches, "planes", lambda *args: far_apart(build_planes(*args)))
    monkeypatch.setattr(kernel_launches, "dz_of", lambda *args: far_apart(build_dz(*args)))
    far = everything()
    assert all(torch.equal(x.nan_to_num(9.0), y.nan_to_num(9.0)) for x, y in zip(near, far, strict=True))
    assert all(x.stride(-2) * (p.T - 1) >= 2**31 for x in far[2:])
