"""Run forward and backward of a call tile by tile: a backend is whoever makes the tiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Gradients, Inputs, Needs, Part
from . import rowmath
from .grid import Grid, kept_tile
from .logits import Side, Sums

FP16_HEADROOM = 2.0**14  # |dz| is scaled to stay below it


class Kind(Enum):
    """Say which softmaxes eq. (9) needs in a block of rows, by which of a and c are 0 in all of them."""

    NOTHING = 0
    ONLY_P = 1
    ONLY_Q = 2
    BOTH = 3


class Tiles(Protocol):
    """Make tiles of both models' logits, and reduce each before the next takes its place."""

    grid: Grid
    policy: Side

    def part(self, rows: slice, cols: slice, labels_2R: Tensor, kept: Tensor | None) -> Tensor:
        """Return the states ``(K, STATE, R)`` of the K parts that these columns make, without the labels' columns.

        Write the logits of labels among these columns to `labels_2R`, and the tile to `kept` ``(2, R, C)`` if given.
        """
        ...

    def dz(self, rows: slice, cols: slice, kind: Kind, row_R: Tensor, kept: Tensor | None) -> Tensor:
        """Return dz ``(R, C)`` by eq. (9) at the outputs of ``h W^T + b``, from the kept tile or from a new one."""
        ...

    def checked(self, part: Part) -> Part:
        """Return `part`, once the kernels that made it are known to be sound."""
        ...


class Backend(NamedTuple):
    """Compute eqs. (1), (2) and their gradients (6), (7) of the rows of a call, by the tiles that `make` returns."""

    make: Callable[[Inputs], Tiles]

    def forward(self, inputs: Inputs, kept: Tensor) -> Part:
        """Return the part, and fill `kept`, which is flat, with as many tiles of both models' logits as fit."""
        tiles = self.make(inputs)
        labels_2T, blocks = kept.new_zeros(2, tiles.grid.T), tiles.grid.row_blocks() or (slice(0, 0),)
        states = [_row_block(tiles, rows, labels_2T[:, rows], kept) for rows in blocks]
        return tiles.checked(Part(states[0] if len(states) == 1 else torch.cat(states, -1), labels_2T))

    def backward(self, inputs: Inputs, needs: Needs, kept: Tensor, row: Tensor, total: Gradients | None) -> Gradients:
        """Return the gradients from `kept` and from the values of each whole row that `rowmath.cotangents` returns.

        total: given where these rows or columns are not all. Then dh is a summand, returned unrounded, ``(T, D)``; dW
        and db are added to those of `total` that are not None, in the statistics' dtype.
        """
        tiles = self.make(inputs)
        kinds, scale = _read(tiles.grid, row, inputs.policy.dtype)
        row = torch.cat([row[:5], row[5:] * scale]) if scale != 1.0 else row
        sums = Sums(inputs, tiles.grid, needs, tiles.policy, scale, total)
        for rows, cols in sums.tiles():
            kind = kinds[rows.start]
            if kind is not Kind.NOTHING:
                dz_RC = tiles.dz(rows, cols, kind, row[:, rows], kept_tile(kept, tiles.grid, rows, cols))
                sums.add(dz_RC, rows, cols)
            sums.close(rows, cols)
        return sums.finish()


def _row_block(tiles: Tiles, rows: slice, labels_2R: Tensor, kept: Tensor) -> Tensor:
    """Return the state of one block of rows over all columns."""
    grid = tiles.grid
    parts = [tiles.part(rows, cols, labels_2R, kept_tile(kept, grid, rows, cols)) for cols in grid.col_blocks()]
    return rowmath.merge(parts[0] if len(parts) == 1 else torch.cat(parts))


def _read(grid: Grid, row: Tensor, compute: torch.dtype) -> tuple[dict[int, Kind], float]:
    """Return the kind of each block of rows, by its first row, and the power of two that keeps an fp16 dz from
    underflow: |dz| <= |a| + |b|. The device is read once, and not at all while a CUDA graph is captured."""
    starts = [rows.start for rows in grid.row_blocks()]
    if not starts or (row.is_cuda and torch.cuda.is_current_stream_capturing()):
        return dict.fromkeys(starts, Kind.BOTH), 1.0
    a, b, c, label = row[5:].unbind()
    spared_3T = F.pad(torch.stack([a == 0, c == 0, label == 0]), (0, len(starts) * grid.R - grid.T), value=True)
    spared = spared_3T.view(3, len(starts), grid.R).all(-1).T.reshape(-1)
    largest = a.new_zeros(())
    if compute == torch.float16:  # of finite rows: one that is not leaves the others as they are
        largest = a.abs().add_(b.abs()).nan_to_num_(0.0, 0.0, 0.0).amax()
    *spared, largest = torch.cat([spared.to(a.dtype), largest[None]]).tolist()
    kinds = {start: _kind(*spared[3 * i : 3 * i + 3]) for i, start in enumerate(starts)}
    return kinds, 2.0 ** min(math.floor(math.log2(FP16_HEADROOM / largest)), 100) if largest > 0 else 1.0


def _kind(no_q: float, no_p: float, no_label: float) -> Kind:
    if no_q and no_p:
        return Kind.NOTHING if no_label else Kind.ONLY_P
    return Kind.ONLY_P if no_q else Kind.ONLY_Q if no_p else Kind.BOTH
