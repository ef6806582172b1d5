"""Make tiles by library products and reduce them in torch: cache-sized ones, or all of ``[T, V]`` as one."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from ..types import Inputs, Part
from . import rowmath
from .grid import Grid, cut, padded, size, tile_of
from .logits import SIXTEEN_BIT, Side, affine_, block_of, capped, copied_bytes, sides_of
from .rowmath import LOWEST
from .walk import Kind

RUN = 32  # rows that are worth operations of their own
STRIP = {"cpu": 2**18, "cuda": 2**22}  # entries that `rowmath` reduces at once: what caches hold, or a tile
PLANES = 3  # tensors of a tile's size: both models' logits, dz
SCRATCH = 8  # tensors of a strip's size: `rowmath.buffers`, three more where a log-ratio is large


def naive(inputs: Inputs) -> TorchTiles:
    """Return ``[T, V]`` as one tile: a baseline for when in doubt."""
    T, V = inputs.rows.count, inputs.policy.head.weight.shape[0]
    return TorchTiles(inputs, Grid(T, V, max(T, 1), V))


def _runs(kind: Kind, row_R: Tensor) -> list[tuple[slice, Kind]]:
    """Return runs of a block's rows with the kind of each: chosen rows spare q beside rejected rows that need both.

    Only where the few runs of a block can be read without waiting.
    """
    R = row_R.shape[1]
    if kind is not Kind.BOTH or row_R.device.type != "cpu":
        return [(slice(0, R), kind)]
    no_q, no_p = row_R[5] == 0, row_R[7] == 0
    kind_R = torch.where(no_q, Kind.ONLY_P.value, torch.where(no_p, Kind.ONLY_Q.value, Kind.BOTH.value))
    kinds, counts = torch.unique_consecutive(kind_R, return_counts=True)
    if len(kinds) * RUN > R:
        return [(slice(0, R), kind)]
    ends = list(accumulate(counts.tolist(), initial=0))
    return [(slice(a, b), Kind(k)) for a, b, k in zip(ends, ends[1:], kinds.tolist(), strict=False)]


class TorchTiles:
    """Make both models' tiles by library products, and reduce each in torch, a strip of rows at a time."""

    def __init__(self, inputs: Inputs, grid: Grid | None = None) -> None:
        self.dtype, self.extras, self.labels_T = inputs.stats_dtype, inputs.extras, inputs.rows.labels_T
        self.work = inputs.work
        self.sides = self.policy, self.reference = sides_of(inputs, self.work)
        caps = sum(side.head.softcap is not None for side in self.sides)
        per_entry = self.dtype.itemsize * (PLANES + caps)
        if self.policy.model.dtype in SIXTEEN_BIT:
            per_entry += self.policy.model.dtype.itemsize + self.policy.operand_dtype.itemsize  # dz for the products
        per_row, per_col = copied_bytes(self.sides)
        device, scratch = inputs.policy.hidden.device, SCRATCH * self.dtype.itemsize
        self.strip = STRIP.get(device.type, STRIP["cpu"])
        held = per_entry, per_row, per_col + scratch, scratch * self.strip  # a strip has a row at least
        self.grid = grid or cut(inputs, tile_of(device), held)

    def checked(self, part: Part) -> Part:
        return part

    def part(self, rows: slice, cols: slice, labels_2R: Tensor, kept: Tensor | None) -> Tensor:
        logits = [self._logits(m, rows, cols, kept, make=True)[1] for m in (0, 1)]
        inside, index = self._label(rows, cols)
        for logits_RC, label_R in zip(logits, labels_2R, strict=True):
            found = logits_RC.gather(1, index)
            torch.where(inside, found[:, 0], label_R, out=label_R)
            logits_RC.scatter_(1, index, found.masked_fill_(inside[:, None], LOWEST))
        states = [
            rowmath.part(*(block_of(x_RC, strip) for x_RC in logits), self.extras, self.work)
            for strip in self._strips(slice(0, size(rows)), cols)
        ]
        return (states[0] if len(states) == 1 else torch.cat(states, -1))[None]

    def dz(self, rows: slice, cols: slice, kind: Kind, row_R: Tensor, kept: Tensor | None) -> Tensor:
        softcap, x, z, r, make = self.policy.head.softcap, None, None, None, kept is None
        if kind is not Kind.ONLY_Q or softcap is not None:
            x, z = self._logits(0, rows, cols, kept, make)
        if kind is not Kind.ONLY_P:
            _, r = self._logits(1, rows, cols, kept, make)
        dz = self.work.get("dz", self.dtype, size(rows), size(cols))
        for run, its_kind in _runs(kind, row_R):
            for strip in self._strips(run, cols):
                self._dz(block_of(dz, strip), z, r, its_kind, strip, row_R)
        inside, index = self._label(rows, cols)
        dz.scatter_(1, index, torch.where(inside[:, None], row_R[8, :, None], dz.gather(1, index)))
        for strip in self._strips(slice(0, size(rows)), cols) if softcap is not None else ():
            block_of(dz, strip).mul_(rowmath.softcap_slope(block_of(x, strip), softcap))
        return dz

    def _dz(
        self, dz: Tensor, z: Tensor | None, r: Tensor | None, kind: Kind, strip: slice, row_R: Tensor
    ) -> None:  # fmt: skip
        """Write dz of a strip of one kind of rows."""
        row = row_R[:, strip]
        if kind is Kind.BOTH:
            out = rowmath.buffers(dz, self.work)._replace(one=dz)
            rowmath.dz_from_both_(block_of(z, strip), block_of(r, strip), row, out)
        else:
            m = int(kind is Kind.ONLY_Q)
            rowmath.dz_from_one_(block_of((z, r)[m], strip), m, row, dz)

    def _strips(self, rows: slice, cols: slice) -> list[slice]:
        """Return rows of a tile in strips of about as many entries as `STRIP` has."""
        most = max(self.strip // size(cols), 1)
        return [slice(a, min(a + most, rows.stop)) for a in range(rows.start, rows.stop, most)] or [rows]

    def _logits(self, m: int, rows: slice, cols: slice, kept: Tensor | None, make: bool) -> tuple[Tensor, Tensor]:
        """Return one model's logits before and after its softcap; those before it are kept."""
        side: Side = self.sides[m]
        shape, bias = (size(rows), size(cols)), side.bias(cols)
        x = kept[m] if kept is not None else None
        if x is None:  # rows as far apart as kept ones: a library's product may depend on it
            x = self.work.get(f"tile {m}", self.dtype, shape[0], padded(shape[1]))[:, : shape[1]]
        if make:
            affine_(side.products(rows, cols, x), side.head, bias)
        if side.head.softcap is None:
            return x, x
        return x, capped(x, side.head, bias, self.work.get(f"capped {m}", self.dtype, *shape))

    def _label(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        """Return which rows' labels are among these columns, and at which; at any if they are not."""
        labels_R = block_of(self.labels_T, rows)
        inside = (labels_R >= cols.start) & (labels_R < cols.stop)
        return inside, (labels_R - cols.start).clamp_(0, size(cols) - 1)[:, None]
