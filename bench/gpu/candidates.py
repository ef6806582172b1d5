"""Which configurations are measured for a case: the present one and its neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tdpo_kernels.tuning import Case, Device, TileConfig
from tdpo_kernels.tuning.heuristic import heuristic, in_turns, keeps_bits

TILES = ((128, 128), (64, 128), (128, 64), (64, 256), (128, 256))  # R x C of the kernels that multiply


def candidates(case: Case, device: Device, few: bool = False) -> list[TileConfig]:
    """The heuristic's first, each once, and only what a launch would use: the same bits, staged or not."""
    base = heuristic(case, device.arch)
    found = dict.fromkeys([base, *_neighbours(case, base, device.arch)])
    return [config for config in found if keeps_bits(case, config, device.arch)][: 2 if few else None]


def _neighbours(case: Case, base: TileConfig, arch: str) -> Iterator[TileConfig]:
    """One or two steps away. What does not fit the device fails when it is compiled, and is left out."""
    if case.kernel in ("fused_stats", "fused_dz"):
        for R, C in TILES:
            for warps in (4, 8, 16):
                yield replace(base, R=R, C=C, warps=warps)
        for change in (dict(stages=3), dict(stages=4), dict(K=32), dict(K=64), dict(K=128, stages=2)):
            yield replace(base, **change)
        if case.aligned:
            yield replace(base, tma=not base.tma)
        yield from in_turns(base, arch)
    else:
        for factor in (1, 2, 4):
            for rows in (base.R, base.R * 2, max(base.R // 2, 1)):
                yield replace(base, R=rows, warps=min(max(base.warps * factor // 2, 1), 16))
