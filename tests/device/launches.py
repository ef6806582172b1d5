"""The kernels of `device/`, launched as a backend would but small, among memory that is NaN.

A problem's products are its logits: hidden states are the identity and the weight is the logits' transpose, so fp32
sums them exactly in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from harness import F32, F64, poisoned, strided
from torch import Tensor

from tdpo_kernels import LMHead
from tdpo_kernels.backends import launch, rowmath
from tdpo_kernels.backends.launch import Head, Kernels
from tdpo_kernels.tuning import TileConfig

SMALL = TileConfig(16, 32, 16)


@dataclass(frozen=True, eq=False)
class Problem:
    """Products ``(T, V)`` of both models, their heads, and a label for each row."""

    products: tuple[Tensor, Tensor]
    labels: Tensor
    dtype: torch.dtype = F32
    softcap: float | None = None
    biased: bool = False

    def __post_init__(self) -> None:
        biases = torch.linspace(-1, 1, 2 * self.V).view(2, -1).to(self.dtype)
        weights = [x.T.contiguous().to(self.dtype) for x in self.products]
        heads = [LMHead(w, b if self.biased else None, 1.0, self.softcap) for w, b in zip(weights, biases, strict=True)]
        object.__setattr__(self, "heads", heads)

    @property
    def T(self) -> int:
        return len(self.labels)

    @property
    def V(self) -> int:
        return self.products[0].shape[1]


def problem(kind: str = "general", T: int = 21, V: int = 86, dtype: torch.dtype = F32) -> Problem:
    """T is no multiple of a row block, V none of a tile, whose last one has the label of one row."""
    g = torch.Generator().manual_seed(0)
    z, noise = (12 if kind == "peaked" else 1) * torch.randn(2, T, V, generator=g, dtype=F64)
    labels = torch.randint(0, V, (T,), generator=g)
    labels[:3] = torch.tensor([V - 1, 0, V // 2])
    r = z + 0.5 * noise
    if kind == "loved":  # one column, by the policy, so that log-ratios are FAR
        z[:, V // 2] += 45
    return Problem((z.float(), r.float()), labels, dtype, *((8.0, True) if kind == "capped" else ()))


class Fixed(Kernels):
    """Kernels with one configuration for what multiplies; the others take as many rows, and the whole tile."""

    tile: TileConfig

    def config(self, kernel: str) -> TileConfig:
        power_of_2 = 1 << (self.columns - 1).bit_length()
        return self.tile if kernel.startswith("fused") else TileConfig(self.tile.R, power_of_2)


def kernels(p: Problem, cols: slice, tile: TileConfig = SMALL, one_head: bool = False) -> Fixed:
    made = Fixed([p.heads[0], p.heads[not one_head]], (p.dtype, p.dtype), True, torch.device("cpu"))
    made.tile, made.columns = tile, cols.stop - cols.start
    return made


def operands(p: Problem, cols: slice, one_head: bool = False) -> list[Tensor]:
    """h, w, g and u, with NaN between the rows, which begin at multiples of 16 bytes."""
    out, eye = [], torch.eye(p.T, dtype=p.dtype)
    for i in range(2):
        out.append(strided(eye, 8 + -p.T % 8))
        out.append(strided(p.heads[0 if one_head else i].weight[cols], 16 + -p.T % 8))
    return out


def heads(p: Problem, cols: slice) -> list[Head]:
    return [launch.head_of(head, None if head.bias is None else head.bias[cols].contiguous()) for head in p.heads]


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

    @property
    def row(self) -> Tensor:
        """The values of the whole rows that backward needs."""
        return rowmath.whole(rowmath.merge(self.states[:, : rowmath.STATE]), self.label_logits, (), 0).row


def _stats(p: Problem, parts: int, launched) -> Stats:
    """One part more than is meant to be written, and labels' logits among other memory."""
    states, logits = poisoned(parts + 1, rowmath.STATE + 2, p.T), poisoned(2, p.T + 5)
    launched(states[:-1], logits[:, : p.T])
    assert states[-1].isnan().all() and logits[:, p.T :].isnan().all()
    return Stats(states[:-1], logits[:, : p.T])


def fused_stats(
    p: Problem, cols: slice | None = None, kept: Tensor | None = None, tile: TileConfig = SMALL, one_head: bool = False
) -> Stats:
    cols = cols or whole(p)
    given = operands(p, cols, one_head), heads(p, cols), p.labels, cols.start
    made = kernels(p, cols, tile, one_head)
    return _stats(p, -(-(cols.stop - cols.start) // tile.C), lambda *to: made.stats(*given, *to, kept))


def tile_stats(p: Problem, cols: slice | None = None) -> Stats:
    cols = cols or whole(p)
    given = tiles(p, cols), heads(p, cols), p.labels, cols.start
    return _stats(p, 1, lambda *to: kernels(p, cols).stats(*given, *to))


def row_values(p: Problem, g_logp: Tensor, g_kl: Tensor, stats: Stats | None = None) -> Tensor:
    rows = poisoned(rowmath.ROW, p.T + 3)
    rows[:, : p.T] = rowmath.cotangents((stats or tile_stats(p)).row, g_logp, g_kl, 1.0)
    return rows[:, : p.T]


def fused_dz(p: Problem, rows: Tensor, cols: slice | None = None, tile: TileConfig = SMALL, dtype=F32) -> Tensor:
    cols = cols or whole(p)
    dz = dz_room(p, cols, dtype)
    kernels(p, cols, tile).dz(operands(p, cols), heads(p, cols), p.labels, cols.start, rows, dz)
    return dz


def tile_dz(p: Problem, rows: Tensor, cols: slice | None = None, given: Tensor | None = None, needs=(True, True)) -> Tensor:  # fmt: skip # noqa: E501
    cols = cols or whole(p)
    pair, dz = tiles(p, cols) if given is None else given, dz_room(p, cols, F32)
    pair = [x if need else nan for x, nan, need in zip(pair, kept(p, cols), needs, strict=True)]
    kernels(p, cols).dz(pair, heads(p, cols), p.labels, cols.start, rows, dz)
    return dz


def dz_room(p: Problem, cols: slice, dtype: torch.dtype) -> Tensor:
    C = cols.stop - cols.start
    return poisoned(p.T, C + -C % 16, dtype=dtype)[:, :C]
