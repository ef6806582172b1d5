"""Cut ``[T, V]`` into tiles, hold the memory that tiles are made in, and say where kept tiles lie."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..types import Inputs

WORKSPACE = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}  # bytes of tiles and gathered operands held at once
TILE = {"cpu": (1024, 1024), "cuda": (2048, 2048)}  # rows x columns
SMALLEST = 64
PAGE, HUGE = mmap.PAGESIZE, 2**25  # bytes of a page, and from which on huge ones are asked for
ALIGNED = 16  # elements: rows of a kept tile, and blocks of rows and columns, begin at multiples


@dataclass(frozen=True)
class Grid:
    """Cut ``[T, V]`` evenly into tiles of at most ``R x C``, the last ones shorter."""

    T: int
    V: int
    R: int
    C: int

    def row_blocks(self) -> tuple[slice, ...]:
        return _blocks(self.T, self.R)

    def col_blocks(self) -> tuple[slice, ...]:
        return _blocks(self.V, self.C)


@lru_cache
def _blocks(length: int, step: int) -> tuple[slice, ...]:
    return tuple(slice(a, min(a + step, length)) for a in range(0, length, step))


def size(block: slice) -> int:
    return block.stop - block.start


def tile_of(device: torch.device) -> tuple[int, int]:
    return TILE.get(device.type, TILE["cpu"])


def cut(
    inputs: Inputs, tile: tuple[int, int], held: tuple[int, ...], multiple: int = ALIGNED, widest: int = 2**20
) -> Grid:
    """Return the grid of tiles that have about as many entries as `tile` and fit into the workspace.

    A call of few rows has tiles of more columns, and one of few columns tiles of more rows. The grid never depends on
    the memory budget.

    Args:
        held: bytes held for each entry, row and column of a tile, and whatever it is.
        multiple: what a tile's columns are a multiple of.
        widest: the most columns of a tile.
    """
    workspace = WORKSPACE.get(inputs.policy.hidden.device.type, WORKSPACE["cpu"])
    return _grid(inputs.rows.count, inputs.policy.head.weight.shape[0], tile, workspace, held, multiple, widest)


@lru_cache
def _grid(
    T: int, V: int, tile: tuple[int, int], workspace: int, held: tuple[int, ...], multiple: int, widest: int
) -> Grid:
    area, (per_entry, per_row, per_col, *fixed) = math.prod(tile), held
    workspace -= sum(fixed)
    R = max(min(T, tile[0]), 1)
    C = min(max(area // R, tile[1]), V, widest)
    R = max(min(area // max(min(C, V), 1), T), R)
    while per_entry * R * C + per_row * R + per_col * C > workspace and max(R, C) > SMALLEST:
        R, C = (R, C // 2) if C > R else (R // 2, C)
    aligned = 1 if T <= R else min(R, ALIGNED)  # kernels take a block's row values to be aligned
    return Grid(T, V, _even(T, R, aligned), _even(V, C, multiple))


def _even(length: int, most: int, multiple: int) -> int:
    """Return a multiple of `multiple` that cuts `length` into the fewest nearly equal blocks of at most `most`."""
    count = max(-(-length // max(most, 1)), 1)
    return max(-(-length // (count * multiple)) * multiple, multiple)


def padded(columns: int) -> int:
    """Return the row stride of a kept tile: always aligned, for kernels are compiled once more for one that is not."""
    return -(-columns // ALIGNED) * ALIGNED


def room(rows: int, vocab: int, itemsize: int, memory_budget: int) -> int:
    """Return how many elements a call of so many rows keeps: all logits of both models, or what the budget holds."""
    return min(2 * rows * padded(vocab), memory_budget // itemsize)


def memory_for(logits: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return memory for so many kept logits. On a CPU it asks for huge pages, of which a first write needs fewer."""
    kept = like.new_empty(logits, dtype=dtype)
    if kept.nbytes >= HUGE and kept.device.type == "cpu" and sys.platform == "linux":
        begin, end = kept.data_ptr() + PAGE - 1 & -PAGE, kept.data_ptr() + kept.nbytes & -PAGE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE)
    return kept


def kept_tile(kept: Tensor, grid: Grid, rows: slice, cols: slice) -> Tensor | None:
    """Return where a tile of both models is kept, ``(2, R, C)``, or None if backward makes it again.

    Tiles lie end to end in column order, as many as `kept` has room for.
    """
    R, C, apart = size(rows), size(cols), padded(size(cols))
    begin = 2 * (grid.T * cols.start + rows.start * apart)
    if begin + 2 * R * apart > kept.numel():
        return None
    return kept[begin : begin + 2 * R * apart].view(2, R, apart)[..., :C]


def tiles(grid: Grid, columns_outer: bool) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and columns of each tile."""
    every_row, every_col = grid.row_blocks(), grid.col_blocks()
    if columns_outer:
        yield from ((rows, cols) for cols in every_col for rows in every_row)
    else:
        yield from ((rows, cols) for rows in every_row for cols in every_col)
