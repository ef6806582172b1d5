"""Which configuration a kernel is launched with, and which backend `auto` takes: data, no torch, no GPU, no measuring.

`choose` has the precedence; `table.py` is what was measured, `heuristic.py` what stands in for it where nothing was.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from .config import Case, Device, TileConfig, product_of
from .heuristic import heuristic, keeps_bits, widths
from .table import TABLES, table_of

__all__ = ["Case", "Device", "TileConfig", "choose", "winner"]


def choose(
    kernel: str,
    device: Device,
    itemsize: int,
    *,
    width: int = 0,
    columns: int = 0,
    staged: bool = False,
    one_head: bool = False,
    bias: bool = False,
    softcap: bool = False,
    extras: bool = False,
    ieee: bool = False,
    aligned: bool = True,
    explicit: TileConfig | None = None,
    tables: Path = TABLES,
) -> TileConfig:
    """The configuration of a launch, in this order of precedence:

    1. `explicit`, as it is;
    2. the row of the device's table ``tables/<device>.json`` that was measured for this case, nearest in hidden size.
       A row of statistics with another C or K than the heuristic's, or with other rows per warp, is skipped: what is
       staged must not change a bit of the statistics (`heuristic.keeps_bits`);
    3. the heuristic of the device's architecture, compiled and checked by ``python -m tdpo_kernels kernels``.

    Nothing is measured here, and nothing depends on the number of rows.

    Args:
        itemsize: bytes of an operand (of what is staged, of dz, where a kernel multiplies nothing): 2 or 4.
        width: the hidden size, D; chooses between rows of the table only.
        columns: of the tile, for kernels whose caller cuts it (`staged_dz`, `tile_stats`, `tile_dz`): C is the power of
            two from there; 0 is what `heuristic.widths` names first.
        ieee: fp32 is multiplied as it is, not as tf32.
        aligned: bases and row strides of all matrices are multiples of 16 bytes.

    Raises:
        ValueError: there is no configuration for the architecture, the tile is too wide, or the table is malformed.
    """
    if explicit is not None:
        return explicit
    product = product_of(itemsize, ieee)
    case = Case(kernel, product, staged, one_head, bias, softcap, extras, aligned, columns).relevant()
    return _choose(case.with_columns(widths(kernel)), device, width, tables)


@lru_cache(maxsize=4096)
def _choose(case: Case, device: Device, width: int, tables: Path) -> TileConfig:
    table = table_of(device, tables)
    measured = table and table.config(case, width, lambda config: keeps_bits(case, config, device.arch))
    return measured or heuristic(case, device.arch)


def winner(device: Device, itemsize: int, D: int, V: int, tables: Path = TABLES) -> str | None:
    """The backend, ``fused`` or ``tiled``, that was faster at the measured sizes nearest to these; None where nothing
    was measured with operands of `itemsize` bytes on this device."""
    table = table_of(device, tables)
    return table.backend(itemsize, D, V) if table else None


def forget() -> None:
    """Reads tables anew: for whoever just wrote one."""
    _choose.cache_clear()
    table_of.cache_clear()
