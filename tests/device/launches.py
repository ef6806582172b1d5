"""The kernels of `device/`, launched as a backend would but small, among memory that is NaN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from exact import Problem, with_label
from harness import F32, bounds, poisoned, power_of_2, strided
from torch import Tensor
from truth import exact

from tdpo_kernels.backends import launch
from tdpo_kernels.backends.launch import Head, Kernels
from tdpo_kernels.backends.rowmath import ROW, STATE
from tdpo_kernels.tuning import TileConfig

SMALL = TileConfig(16, 32, 16)


class Fixed(Kernels):
    """Kernels with one configuration for what multiplies; the others take as many rows, and the whole tile."""

    tile: TileConfig

    def config(self, kernel: str) -> TileConfig:
        return self.tile if kernel.startswith("fused") else TileConfig(self.tile.R, power_of_2(self.columns))


def kernels(p: Problem, cols: slice, tile: TileConfig = SMALL, one_head: bool = False) -> Fixed:
    heads = p.head(0), p.head(0 if one_head else 1)
    made = Fixed(heads, (p.dtype, p.dtype), True, torch.device("cpu"))
    made.tile, made.columns = tile, cols.stop - cols.start
    return made


def operands(p: Problem, cols: slice, one_head: bool = False) -> list[Tensor]:
    """h, w, g and u, with NaN between the rows, which begin at multiples of 16 bytes."""
    out, eye = [], torch.eye(p.T, dtype=p.dtype)
    hidden = [eye, p.products[1] @ torch.linalg.pinv(p.products[0])] if one_head else [eye, eye]
    for i in range(2):
        out.append(strided(hidden[i].to(p.dtype), 8 + -p.T % 8))
        out.append(strided(p.head(0 if one_head else i).weight[cols], 16 + -p.T % 8))
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
    return poisoned(parts + 1, STATE + 2, p.T), poisoned(2, p.T + 5)


def _found(p: Problem, states: Tensor, logits: Tensor) -> Stats:
    assert states[-1].isnan().all() and logits[:, p.T :].isnan().all()
    return Stats(states[:-1], logits[:, : p.T])


def fused_stats(
    p: Problem, cols: slice | None = None, kept: Tensor | None = None, tile: TileConfig = SMALL, one_head: bool = False
) -> Stats:
    cols = cols or whole(p)
    states, logits = _room(p, -(-(cols.stop - cols.start) // tile.C))
    matrices, hs = operands(p, cols, one_head), heads(p, cols)
    with bounds(*matrices, *(h.bias for h in hs), p.labels, states[:-1], logits, kept):
        made = kernels(p, cols, tile, one_head)
        made.stats(matrices, hs, p.labels, cols.start, states[:-1], logits[:, : p.T], kept)
    return _found(p, states, logits)


def tile_stats(p: Problem, cols: slice | None = None) -> Stats:
    cols = cols or whole(p)
    (states, logits), pair, hs = _room(p, 1), tiles(p, cols), heads(p, cols)
    with bounds(pair, p.labels, states[:-1], logits, *(h.bias for h in hs)):
        kernels(p, cols).stats(pair, hs, p.labels, cols.start, states[:-1], logits[:, : p.T])
    return _found(p, states, logits)


def row_values(p: Problem, g_logp: Tensor, g_kl: Tensor, stats: Stats | None = None) -> Tensor:
    """``(ROW, T)``; the label's dz is the truth's."""
    stats = stats or tile_stats(p)
    state = with_label(stats.states, stats.label_logits)
    label_dz = p.true.dz(p.labels, exact(g_logp), exact(g_kl))[range(p.T), p.labels]
    rows = poisoned(ROW, p.T + 3)
    rows[:5, : p.T] = torch.from_numpy(state[[0, 1, 2, 3, 5]])
    rows[5:, : p.T] = torch.stack([-g_kl, -g_logp, g_kl - g_logp, torch.from_numpy(label_dz.astype(float)).to(F32)])
    return rows[:, : p.T]


def fused_dz(p: Problem, rows: Tensor, cols: slice | None = None, tile: TileConfig = SMALL, dtype=F32) -> Tensor:
    cols = cols or whole(p)
    dz, matrices, hs = dz_room(p, cols, dtype), operands(p, cols), heads(p, cols)
    with bounds(*matrices, *(h.bias for h in hs), p.labels, rows, dz):
        kernels(p, cols, tile).dz(matrices, hs, p.labels, cols.start, rows, dz)
    return dz


def tile_dz(p: Problem, rows: Tensor, cols: slice | None = None, given: Tensor | None = None, needs=(True, True)) -> Tensor:  # fmt: skip # noqa: E501
    cols = cols or whole(p)
    pair, hs, dz = tiles(p, cols) if given is None else given, heads(p, cols), dz_room(p, cols, F32)
    pair = [x if need else nan for x, nan, need in zip(pair, kept(p, cols), needs, strict=True)]
    with bounds(*pair, p.labels, rows, dz, *(h.bias for h in hs)):
        kernels(p, cols).dz(pair, hs, p.labels, cols.start, rows, dz)
    return dz


def dz_room(p: Problem, cols: slice, dtype: torch.dtype) -> Tensor:
    C = cols.stop - cols.start
    return poisoned(p.T, C + -C % 16, dtype=dtype)[:, :C]
