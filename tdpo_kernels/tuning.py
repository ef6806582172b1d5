"""Choose a kernel's configuration and, for `auto`, a backend: measured, else by heuristic, for any number of rows.

What was measured on a device is in ``tables/<device>.json``, or in the file that TDPO_KERNELS_TUNING names:

    {"device": "NVIDIA H200", "arch": "sm_90",
     "configs": [{"case": {"kernel": "fused_dz", "product": "16bit"}, "D": 4096, "config": {"R": 128, ...}, "ms": 21}],
     "winners": [{"itemsize": 2, "D": 4096, "V": 128256, "ms": {"fused": 101.0, "tiled": 88.0}}]}

A row counts for every case that has the properties its ``case`` names. The heuristics were compiled, never timed.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from math import log
from pathlib import Path

SWITCH, TABLES, INTERPRETER = "TDPO_KERNELS_TUNING", Path(__file__).parent / "tables", "interpreter"
WIDTHS = (1024, 2048, 4096)  # of the tiles in memory that `tile_stats` and `tile_dz` have configurations for
SMALL = 1024  # up to this hidden size two programs overlap, one's epilogue and the other's product


@dataclass(frozen=True)
class TileConfig:
    """Configure a launch: R rows by C columns a program, K of the inner dimension a step; operands by descriptor if
    `tma`; at most `registers` a thread on CUDA, where 0 means no limit."""

    R: int
    C: int = 1
    K: int = 1
    warps: int = 4
    stages: int = 1
    tma: bool = False
    registers: int = 0

    @property
    def options(self) -> dict[str, int | bool]:
        """Return a launch's options. Fused multiply-adds are off: with them equal logits would not differ by 0."""
        options = dict(num_warps=self.warps, num_stages=self.stages, enable_fp_fusion=False)
        return options | (dict(maxnreg=self.registers) if self.registers else {})


@dataclass(frozen=True)
class Device:
    """Name a device as its driver does, and its architecture: ``"sm_90"``, ``"gfx942"``, ... or ``"interpreter"``."""

    name: str
    arch: str


@dataclass(frozen=True)
class Case:
    """Say what a configuration depends on. `product` says how operands are multiplied: "16bit", "tf32" or "ieee";
    `one_head` says that both weights are one tensor, `aligned` that bases and row strides of all matrices are multiples
    of 16 bytes; `columns` is the width of the tile that `tile_stats` or `tile_dz` is given, 0 for the other kernels."""

    kernel: str
    product: str = "16bit"
    one_head: bool = False
    bias: bool = False
    softcap: bool = False
    extras: bool = False
    aligned: bool = True
    columns: int = 0


@lru_cache(maxsize=4096)
def choose(case: Case, device: Device, width: int) -> TileConfig:
    """Return the device's measured row of this case nearest in hidden size, else the heuristic.

    `fused_dz` must make the bits that `fused_stats` made, so both step along D alike: rows with another K than the
    heuristic's are skipped. Raise ValueError where there is no configuration, or a table that cannot be read.
    """
    own = heuristic(case, device.arch, width)
    rows = [row for row in _table(device)["configs"] if row["case"].items() <= asdict(case).items()]
    rows = [row for row in rows if row["config"].K == own.K and (row["config"].C == own.C or not case.columns)]
    return min(rows, key=lambda row: abs(log(row["D"] / width)))["config"] if rows else own


def winner(device: Device, itemsize: int, D: int, V: int) -> str | None:
    """Return the backend that was faster at the measured sizes nearest to these, or None where nothing was measured."""
    rows = [row for row in _table(device)["winners"] if row["itemsize"] == itemsize]
    nearest = min(rows, key=lambda row: abs(log(row["D"] / D)) + abs(log(row["V"] / V)), default=None)
    return nearest and min(nearest["ms"], key=nearest["ms"].__getitem__)


@cache
def _table(device: Device) -> dict[str, list[dict]]:
    path = Path(os.environ.get(SWITCH) or TABLES / f"{re.sub(r'[^a-z0-9]+', '-', device.name.lower()).strip('-')}.json")
    if path.parent == TABLES and not path.is_file():
        return {"configs": [], "winners": []}
    try:
        data = json.loads(path.read_text())
        if data["arch"] != device.arch:
            raise ValueError(f"it was measured on {data['arch']}, this device is {device.arch}")
        for row in data["configs"]:
            row["config"], row["D"] = TileConfig(**row["config"]), int(row["D"])
            row["case"].pop("columns", 0)  # the width of a tile is its configuration's
        return {"configs": data["configs"], "winners": data["winners"]}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the tuning table {path}: {type(error).__name__}: {error}") from error


FAMILIES = {"sm_8": "sm_80", "sm_9": "sm_90", "sm_10": "sm_100", "sm_11": "sm_100", "sm_12": "sm_80", "gfx9": "gfx942"}
_C = TileConfig
# Plain; plain with a SMALL D; any other; fp32 without tensor cores. K is for 16 bits. None spills in a loop. sm_80's
# fit the 99 KB of sm_86, sm_89 and sm_120. On sm_90 wgmma wants 64 rows, 128 registers let two programs run at once.
RULES = {
    "sm_80": (*[_C(64, 128, 32, 8, 4)] * 3, _C(64, 64, 32, 8, 2)),
    "sm_80 fused_dz": (*[_C(128, 128, 32, 8, 4)] * 2, _C(64, 128, 32, 8, 4), _C(64, 64, 32, 8, 2)),
    "sm_90": (_C(128, 128, 64, 8, 4, True), _C(128, 64, 64, 8, 3, True, 128), _C(128, 64, 64, 8, 4, True),
              _C(64, 64, 32, 8, 2, True)),
    "sm_100 fused_stats": (*[_C(128, 64, 64, 8, 4, True)] * 3, _C(64, 64, 32, 8, 2, True)),
    "sm_100": (*[_C(128, 128, 64, 8, 4, True)] * 2, _C(128, 64, 64, 8, 4, True), _C(64, 64, 32, 8, 2, True)),
    "gfx942 fused_dz": (*[_C(128, 128, 32, 8, 2)] * 2, *[_C(128, 64, 32, 8, 2)] * 2),
    "gfx942": (*[_C(128, 128, 32, 8, 2)] * 3, _C(128, 64, 32, 8, 2)),
}  # fmt: skip


def family_of(arch: str) -> str:
    """Return the family whose configurations `arch` is given, or raise ValueError."""
    if family := next((FAMILIES[start] for start in FAMILIES if arch.startswith(start)), ""):
        return family
    have = f"there are some for {sorted({*FAMILIES.values()})}, since bf16 products want tensor cores of sm_80 or newer"
    raise ValueError(f"no configuration for {arch!r}: {have}")


def heuristic(case: Case, arch: str, width: int) -> TileConfig:
    """Return the configuration that stands in for a measured one, or raise ValueError."""
    if case.columns > max(WIDTHS):
        raise ValueError(f"a tile of {case.columns} columns, wanted {max(WIDTHS)} at most")
    C = min(C for C in WIDTHS if C >= case.columns) if case.columns else 0
    if arch == INTERPRETER:
        return TileConfig(32, C or 128, 64)
    family = family_of(arch)
    if C:  # 16 elements a thread in 32 lanes
        return TileConfig(max(4096 // C, 1), C, warps=max(4096, C) // (1024 if family == "gfx942" else 512))
    rules, heavy = RULES.get(f"{family} {case.kernel}", RULES[family]), case.softcap or case.extras or not case.aligned
    config = rules[3 if case.product == "ieee" else 2 if heavy else width <= SMALL]
    if not case.aligned:  # no descriptors, and no copies that run ahead of the products
        config = replace(config, C=min(config.C, 64), K=min(config.K, 32), stages=2, tma=False)
    return config if case.product == "16bit" else replace(config, K=config.K // 2)
