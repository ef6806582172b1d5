"""The walk over the logits: how ``[T, V]`` is cut into tiles, what a tile needs loaded, and what is staged from
forward to backward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..types import Inputs, Model
from .products import SIXTEEN_BIT, block_of, logits_, operand_dtype

WORKSPACE = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}  # bytes of tiles and gathered operands held at once
TILE = {"cpu": (1024, 1024), "cuda": (2048, 4096)}  # rows x columns, at most
LAUNCHED = 2**33  # multiplications, 17 us of an H200 by its data sheet: a shorter product does not outlast its launch
SMALLEST = 64
SLAB = 16 * 2**20  # bytes of a CPU's workspace that dz of all rows and one column block may take in bf16


@dataclass(frozen=True)
class Grid:
    """``[T, V]`` cut into tiles of at most ``R x C``, evenly, the last ones shorter. Depends on shapes only, never
    on the budget."""

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


def _even(length: int, most: int, multiple: int) -> int:
    """The step, a multiple of `multiple`, that cuts `length` into as few nearly equal blocks as `most` allows."""
    count = max(-(-length // most), 1)
    return max(-(-length // (count * multiple)) * multiple, multiple)


def make_grid(inputs: Inputs) -> Grid:
    """For tiles of fp32 (float64) logits in memory, and everything that is done to them: both models', their softmaxes,
    and what a library returns a product in; a softcap's slope; t."""
    stats = inputs.stats_dtype
    per_tile = stats.itemsize * (6 if inputs.policy.head.softcap is None else 7)
    if inputs.policy.dtype in SIXTEEN_BIT:
        per_tile += inputs.policy.dtype.itemsize  # dz for the products
    per_row, per_col = copied_bytes(inputs, widen=True)
    if has_slab(inputs):
        per_col += inputs.rows.count * inputs.policy.dtype.itemsize
    return cut(inputs, per_tile, per_row, per_col, pair=2 * stats.itemsize)


def tile_of(device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile, at most."""
    return TILE.get(device.type, TILE["cpu"])


def has_slab(inputs: Inputs) -> bool:
    """Whether products come back in 16 bits, as the gradients are, and dz of all rows and some columns is small: then
    backward has a slab of it (`sums.SlabSums`). fp16 would overflow."""
    policy, T = inputs.policy, inputs.rows.count
    if any(x != torch.bfloat16 for x in (policy.dtype, policy.hidden.dtype, policy.head.weight.dtype)):
        return False
    if policy.hidden.device.type != "cpu":
        return False
    return T * 2 * TILE["cpu"][1] + (0 if inputs.rows.hidden_T is None else T * 2 * policy.hidden.shape[1]) <= SLAB


def cut(inputs: Inputs, per_tile: int, per_row: int, per_col: int, multiple: int = 16, pair: int = 0) -> Grid:
    """The grid whose tiles, with this many bytes held per entry, row and column, fit into the workspace; and of which
    `pair` bytes per entry fit into a GPU's cache. Columns are cut at multiples of `multiple`."""
    device = inputs.policy.hidden.device
    workspace, tile = WORKSPACE.get(device.type, WORKSPACE["cpu"]), tile_of(device)
    if pair and device.type == "cuda":
        tile = in_cache(tile, pair, _cache_bytes(device), inputs.policy.hidden.shape[1])
    T, V = inputs.rows.count, inputs.policy.head.weight.shape[0]
    return _grid(T, V, tile, workspace, (per_tile, per_row, per_col), multiple)


def in_cache(tile: tuple[int, int], pair: int, cache: int, D: int) -> tuple[int, int]:
    """Rows and columns, halved until `pair` bytes per entry fit into `cache`, or products would be as short as their
    launches."""
    R, C = tile
    while pair * R * C > cache and R * C * D >= 2 * LAUNCHED:
        R, C = _halved(R, C)
    return R, C


def _halved(R: int, C: int) -> tuple[int, int]:
    return (R, C // 2) if C > R else (R // 2, C)


@lru_cache
def _cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


@lru_cache
def _grid(T: int, V: int, tile: tuple[int, int], workspace: int, held: tuple[int, int, int], multiple: int) -> Grid:
    (R, C), (per_tile, per_row, per_col) = tile, held
    while per_tile * R * C + per_row * R + per_col * C > workspace and max(R, C) > SMALLEST:
        R, C = _halved(R, C)
    aligned = 1 if T <= R else min(R, 16)  # a block's row values begin where a kernel takes them to be aligned
    return Grid(T, V, _even(T, R, aligned), _even(V, C, multiple))


def copied_bytes(inputs: Inputs, widen: bool) -> tuple[int, int]:
    """Bytes per row and per column of gathered, rounded and (if `widen`) widened operands and of partial gradients."""
    stats = inputs.stats_dtype
    per_row = per_col = 0
    for side in (inputs.policy, inputs.reference):
        width = side.hidden.shape[1]
        gathered = 0 if inputs.rows.hidden_T is None else side.hidden.dtype.itemsize
        per_row += width * (gathered + _copies(side.hidden.dtype, side.dtype, stats if widen else side.dtype))
        per_col += width * _copies(side.head.weight.dtype, side.dtype, stats if widen else side.dtype)
    partial = inputs.policy.hidden.shape[1] * stats.itemsize
    return per_row + 2 * partial, per_col + partial


def _copies(source: torch.dtype, compute: torch.dtype, stats: torch.dtype) -> int:
    """Bytes per element of what rounding to `compute` and widening to `stats` copies."""
    return (compute.itemsize if compute != source else 0) + (stats.itemsize if stats != compute else 0)


class Workspace:
    """Buffers by name, made at first use and used again, so that no tile costs page faults twice."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: dict[str, Tensor] = {}
        self.views: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}

    def get(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """A contiguous view of the buffer `name`, grown if need be; its content is whatever was there."""
        view = self.views.get((name, dtype, shape))
        if view is None:
            have, size = self.buffers.get(name), math.prod(shape)
            if have is None or have.numel() < size or have.dtype != dtype:
                self.views = {key: x for key, x in self.views.items() if key[0] != name}
                have = self.buffers[name] = torch.empty(shape, dtype=dtype, device=self.device)
            view = have if have.shape == shape else have.view(-1)[:size].view(shape)
            self.views[name, dtype, shape] = view
        return view


class Operand:
    """Blocks of one matrix, gathered, rounded to the compute dtype and widened to the dtype of the product; no copy
    where none is needed."""

    def __init__(self, work: Workspace, name: str, source: Tensor, index: Tensor | None, compute: torch.dtype) -> None:
        self.work, self.name, self.source, self.index, self.compute = work, name, source, index, compute
        self.loaded: dict[torch.dtype, tuple[slice, Tensor]] = {}

    def needs_copy(self) -> bool:
        return self.index is not None or self.source.dtype != self.compute

    def block(self, rows: slice, dtype: torch.dtype) -> Tensor:
        if self.index is None and self.source.dtype == self.compute == dtype:
            return block_of(self.source, rows)
        have = self.loaded.get(dtype)
        if have is None or have[0] != rows:
            have = self.loaded[dtype] = (rows, self._load(rows, dtype))
        return have[1]

    def _load(self, rows: slice, dtype: torch.dtype) -> Tensor:
        n, width = rows.stop - rows.start, self.source.shape[1]
        if self.index is None:
            x = block_of(self.source, rows)
        else:
            x = self.work.get(f"{self.name} gathered", self.source.dtype, n, width)
            torch.index_select(self.source, 0, self.index[rows], out=x)
        for step in dict.fromkeys((self.compute, dtype)):  # round first, then widen
            if x.dtype != step:
                x = self.work.get(f"{self.name} {step}", step, n, width).copy_(x)
        return x


class Side:
    """One model in the walk: hands out tiles of its logits, and the operands of its gradient products."""

    def __init__(self, model: Model, index_T: Tensor | None, work: Workspace, name: str, stats: torch.dtype) -> None:
        device = model.hidden.device
        self.model, self.name, self.work, self.stats = model, name, work, stats
        self.hidden = Operand(work, f"{name} hidden", model.hidden, index_T, model.dtype)
        self.weight = Operand(work, f"{name} weight", model.head.weight, None, model.dtype)
        self.operand_dtype = operand_dtype(model.dtype, stats, device)

    def products(self, rows: slice, cols: slice, out: Tensor) -> Tensor:
        """``h W^T`` of one tile, in the statistics' dtype."""
        dtype = self.operand_dtype
        return logits_(out, self.hidden.block(rows, dtype), self.weight.block(cols, dtype))

    def gradient_operand(self, dz_RC: Tensor) -> Tensor:
        """dz rounded to the compute dtype, on every device alike, in the dtype its products are taken in."""
        for step in dict.fromkeys(
            (self.model.dtype if self.model.dtype in SIXTEEN_BIT else dz_RC.dtype, self.operand_dtype)
        ):
            if dz_RC.dtype != step:
                dz_RC = self.work.get(f"dz {step}", step, *dz_RC.shape).copy_(dz_RC)
        return dz_RC


def sides_of(inputs: Inputs, work: Workspace) -> tuple[Side, Side]:
    index = inputs.rows.hidden_T
    return (
        Side(inputs.policy, index, work, "z", inputs.stats_dtype),
        Side(inputs.reference, index, work, "r", inputs.stats_dtype),
    )


@dataclass(frozen=True)
class StagedTile:
    """One tile as backward wants it: p within the tile, and t, such that ``p e^-t`` is q within the tile
    (`tile_math.weigh_`); the softcap's slope, if any; and each row's weights and ratio, with which p is ``weight * p``
    in the whole vocabulary, and q ``ref_weight * p e^-(t + ratio)`` (`tile_math.tile_weights`).
    """

    pair: Tensor  # (2, R, C)
    exact: bool  # in full precision
    slope: Tensor | None
    row_values: Tensor  # (3, R): weight, ref_weight and ratio


class Stage:
    """What is kept for backward: the first tiles in column order, as many as the budget holds, in one flat buffer."""

    def __init__(
        self, inputs: Inputs, grid: Grid, flat: Tensor | None = None, row_values: Tensor | None = None
    ) -> None:
        self.grid, self.row_count = grid, max(len(grid.row_blocks()), 1)
        self.planes = 2 if inputs.policy.head.softcap is None else 3
        self.dtype = torch.bfloat16 if inputs.policy.dtype in SIXTEEN_BIT else inputs.stats_dtype
        self.flat, self.row_values = flat, row_values
        columns, stats = len(grid.col_blocks()), inputs.stats_dtype
        self.exact = self.dtype == stats
        if flat is None:
            slot = self.planes * grid.R * grid.C
            per_tile = slot * self.dtype.itemsize + 3 * grid.R * stats.itemsize
            count = min(inputs.memory_budget // per_tile, self.row_count * columns)
            self.flat = inputs.keep(count, slot, dtype=self.dtype)
            self.row_values = inputs.keep(3, count, grid.R, dtype=stats)

    def tile(self, i: int, k: int, rows: int, cols: int) -> StagedTile | None:
        """Where row block i and column block k are staged, or None if they are to be recomputed."""
        slot = k * self.row_count + i
        if slot >= self.flat.shape[0]:
            return None
        size, strides = rows * cols, (rows * cols, cols, 1)
        begin = self.flat.storage_offset() + slot * self.flat.shape[1]
        pair = self.flat.as_strided((2, rows, cols), strides, begin)
        slope = None if self.planes == 2 else self.flat.as_strided((rows, cols), strides[1:], begin + 2 * size)
        values = self.row_values.select(1, slot)
        return StagedTile(pair, self.exact, slope, values if rows == self.grid.R else values[:, :rows])

    def rows_of(self, i: int, rows: int) -> Tensor:
        """``(3, k, rows)``: the values of the tiles of row block i that are staged."""
        return self.row_values[:, i :: self.row_count, :rows]


def blocks(slices: Sequence[slice]) -> Iterator[tuple[int, slice, int]]:
    """Index, slice and length of each block."""
    return ((i, s, s.stop - s.start) for i, s in enumerate(slices))
