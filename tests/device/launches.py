"""The kernels of `device/`, launched as a backend would but small, among memory that is NaN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from exact import Problem, with_label
from harness import F32, bounds, poisoned, strided
from torch import Tensor
from truth import exact

from tdpo_kernels.backends import launch
from tdpo_kernels.backends.launch import EXTRAS, ROWS, STATE, Head, Operands, Traits
from tdpo_kernels.tuning import TileConfig

SMALL = TileConfig(16, 32, 16)


@dataclass(frozen=True)
class Fixed(Traits):
    """Traits with one configuration for what multiplies; the others take as many rows, and the whole tile."""

    tile: TileConfig = SMALL

    def config(self, kernel: str, columns: int = 0) -> TileConfig:
        if not columns:
            return self.tile
        return TileConfig(self.tile.R, 1 << max(columns - 1, 0).bit_length())


def traits(p: Problem, tile: TileConfig = SMALL, one_head: bool = False) -> Fixed:
    heads = p.head(0), p.head(0 if one_head else 1)
    made = launch.traits_of(heads, (p.dtype, p.dtype), True, torch.device("cpu"))
    return Fixed(made.case, made.device, made.width, tile)


def operands(p: Problem, cols: slice, one_head: bool = False) -> list[Operands]:
    """With NaN between the rows, which begin at multiples of 16 bytes."""
    out, eye = [], torch.eye(p.T, dtype=p.dtype)
    hidden = [eye, p.products[1] @ torch.linalg.pinv(p.products[0])] if one_head else [eye, eye]
    for i in range(2):
        weight = strided(p.head(0 if one_head else i).weight[cols], 16 + -p.T % 8)
        out.append(Operands(strided(hidden[i].to(p.dtype), 8 + -p.T % 8), weight, heads(p, cols)[i]))
    return out


def heads(p: Problem, cols: slice) -> list[Head]:
    biases = [None if b is None else b[cols].contiguous() for b in p.biases]
    return [launch.head_of(p.head(i), biases[i]) for i in range(2)]


def tiles(p: Problem, cols: slice) -> Tensor:
    """Both products, as `fused_stats` keeps them."""
    return kept(p, cols).copy_(torch.stack([x[:, cols].to(p.dtype).float() for x in p.products]))


def kept(p: Problem, cols: slice) -> Tensor:
    C = cols.stop - cols.start
    return poisoned(2, p.T, C + -C % 16)[..., :C]


def whole(p: Problem) -> slice:
    return slice(0, p.V)


@dataclass(frozen=True, eq=False)
class Stats:
    states: Tensor
    label_logits: Tensor


def _room(p: Problem, parts: int) -> tuple[Tensor, Tensor]:
    """One part more than is meant to be written, and labels' logits among other memory."""
    return poisoned(parts + 1, STATE + EXTRAS, p.T), poisoned(2, p.T + 5)


def _found(p: Problem, states: Tensor, logits: Tensor) -> Stats:
    assert states[-1].isnan().all() and logits[:, p.T :].isnan().all()
    return Stats(states[:-1], logits[:, : p.T])


def fused_stats(
    p: Problem, cols: slice | None = None, kept: Tensor | None = None, tile: TileConfig = SMALL, one_head: bool = False
) -> Stats:
    cols = cols or whole(p)
    states, logits = _room(p, -(-(cols.stop - cols.start) // tile.C))
    sides = operands(p, cols, one_head)
    with bounds(*_memory(sides), p.labels, states[:-1], logits, kept):
        t = traits(p, tile, one_head)
        launch.fused_stats(t, *sides, p.labels, cols.start, states[:-1], logits[:, : p.T], kept)
    return _found(p, states, logits)


def tile_stats(p: Problem, cols: slice | None = None) -> Stats:
    cols = cols or whole(p)
    (states, logits), pair, hs = _room(p, 1), tiles(p, cols), heads(p, cols)
    with bounds(pair, p.labels, states[:-1], logits, *(h.bias for h in hs)):
        launch.tile_stats(traits(p), pair, hs, p.labels, cols.start, states[:-1], logits[:, : p.T])
    return _found(p, states, logits)


def row_values(p: Problem, g_logp: Tensor, g_kl: Tensor, stats: Stats | None = None) -> Tensor:
    """``(ROWS, T)``; the label's dz is the truth's."""
    stats = stats or tile_stats(p)
    state = with_label(stats.states, stats.label_logits)
    label_dz = p.true.dz(p.labels, exact(g_logp), exact(g_kl))[range(p.T), p.labels]
    rows = poisoned(ROWS, p.T + 3)
    rows[:5, : p.T] = torch.from_numpy(state[[0, 1, 2, 3, 5]])
    rows[5:, : p.T] = torch.stack([-g_kl, -g_logp, g_kl - g_logp, torch.from_numpy(label_dz.astype(float)).to(F32)])
    return rows[:, : p.T]


def fused_dz(p: Problem, rows: Tensor, cols: slice | None = None, tile: TileConfig = SMALL, dtype=F32) -> Tensor:
    cols = cols or whole(p)
    dz, sides = dz_room(p, cols, dtype), operands(p, cols)
    with bounds(*_memory(sides), p.labels, rows, dz):
        launch.fused_dz(traits(p, tile), *sides, p.labels, cols.start, rows, dz)
    return dz


def tile_dz(p: Problem, rows: Tensor, cols: slice | None = None, given: Tensor | None = None, needs=(True, True)) -> Tensor:  # fmt: skip # noqa: E501
    cols = cols or whole(p)
    pair, hs, dz = tiles(p, cols) if given is None else given, heads(p, cols), dz_room(p, cols, F32)
    pair = [x if need else None for x, need in zip(pair, needs, strict=True)]
    with bounds(*pair, p.labels, rows, dz, *(h.bias for h in hs)):
        launch.tile_dz(traits(p), pair, hs, p.labels, cols.start, rows, dz)
    return dz


def dz_room(p: Problem, cols: slice, dtype: torch.dtype) -> Tensor:
    C = cols.stop - cols.start
    return poisoned(p.T, C + -C % 16, dtype=dtype)[:, :C]


def _memory(sides: list[Operands]) -> list[Tensor | None]:
    return [x for side in sides for x in (side.hidden, side.weight, side.head.bias)]
