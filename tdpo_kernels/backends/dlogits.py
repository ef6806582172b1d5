"""Eq. (6) for one tile: what each row needs of it, its value from staged or recomputed logits, and the label's entry.

With a = -g_kl and b = -g_logp, every entry but the label's is ``dz = p * (b + a * expm1(delta'))``. Rows with a = 0
need only p; rows with a = b need only q = p e^delta'. The label's entry is written on its own, from 1 - p_y =
-expm1(logp), which 1 - exp(logp) would lose.
"""

from __future__ import annotations

import math
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Inputs
from .products import block_of
from .slab import Grid, StagedTile
from .tile_math import difference, half_log_ratio_

FP16_HEADROOM = 2.0**14  # |dz| is scaled to stay below it


class Kind(Enum):
    """What a row block's cotangents leave to compute."""

    NOTHING = 0
    ONLY_P = 1
    ONLY_Q = 2
    GENERAL = 3


class Coefficients:
    """Per-row coefficients of eq. (6); each row block's kind, and fp16's scale, read from the device in one go."""

    def __init__(
        self,
        inputs: Inputs,
        grid: Grid,
        row_values: tuple[Tensor, ...],
        g_logp_T: Tensor | None,
        g_kl_T: Tensor | None,
        g_label_T: Tensor | None = None,
    ) -> None:
        self.tops_2T, self.lse_2T, logps_2T, self.lse_diff, ratio = row_values
        logp = logps_2T[0]
        g_logp = torch.zeros_like(logp) if g_logp_T is None else g_logp_T.to(logp.dtype)
        g_kl = torch.zeros_like(logp) if g_kl_T is None else g_kl_T.to(logp.dtype)
        only_q, head = g_kl == g_logp, inputs.policy.head
        self.kinds, self.scale = [Kind.ONLY_P if g_kl_T is None else Kind.GENERAL] * len(grid.row_blocks()), 1.0
        some_only_q = True
        if self.kinds and not (logp.is_cuda and torch.cuda.is_current_stream_capturing()):
            fp16, no_q = inputs.policy.dtype == torch.float16, g_kl == 0
            spared, sizes_T = [no_q, only_q], g_logp.abs() + g_kl.abs() if fp16 else None
            if g_label_T is not None:
                spared.append(g_label_T == 0)
                sizes_T = sizes_T.add_(g_label_T.abs()) if fp16 else None
            blocks, largest = _read(grid, torch.stack(spared), sizes_T)
            self.kinds = [_kind(*(n == grid.R for n in block), softcap=head.softcap is not None) for block in blocks]
            some_only_q = any(block[1] for block in blocks)
            self.scale = _fp16_scale(largest * abs(head.logit_scale)) if fp16 else 1.0
        factor = self.scale * head.logit_scale
        self.a, self.b = g_kl * -factor, g_logp * -factor
        self.label = _at_label(self.a, self.b, logps_2T, ratio, only_q if some_only_q else None, inputs.rows.own_T)
        if g_label_T is not None:
            self.label.add_(g_label_T, alpha=factor)


def _at_label(
    a: Tensor, b: Tensor, logps_2T: Tensor, ratio: Tensor, only_q: Tensor | None, own_T: Tensor | None
) -> Tensor:
    """dz at each row's label.

    Args:
        ratio: ``log(q / p)`` there.
        only_q: in which rows a = b; None: in none.
        own_T: False where the label is elsewhere, and its entry one like the others.
    """
    logp, ref_logp = logps_2T.unbind()
    log_y = logp if only_q is None else torch.where(only_q, ref_logp, logp)
    without_kl, times_a = torch.expm1(log_y), difference(*logps_2T.exp().unbind(), ratio)
    if own_T is not None:
        without_kl = torch.where(own_T, without_kl, log_y.exp())
    if only_q is not None:
        times_a.masked_fill_(only_q, 0.0)
    return torch.addcmul(b * without_kl, a, times_a)


def _read(grid: Grid, spared_FT: Tensor, sizes_T: Tensor | None) -> tuple[list[tuple[int, ...]], float]:
    """Of each row block, of how many of its rows each of the F facts holds, rows that are not there among them; and the
    largest of `sizes_T`. One read of the device."""
    fields, count = len(spared_FT), len(grid.row_blocks())
    if grid.T < count * grid.R:
        spared_FT = F.pad(spared_FT, (0, count * grid.R - grid.T), value=True)
    facts_FB = spared_FT.view(fields, count, grid.R).sum(-1)
    if sizes_T is None:
        return list(zip(*facts_FB.tolist(), strict=True)), 0.0
    *facts, largest = torch.cat([facts_FB.view(-1).to(sizes_T.dtype), sizes_T.amax()[None]]).tolist()
    return list(zip(*(facts[i * count : (i + 1) * count] for i in range(fields)), strict=True)), largest


def _kind(no_q: bool, only_q: bool, no_label: bool = True, *, softcap: bool) -> Kind:
    """From what holds of all rows of a block: g_kl is 0; g_kl is g_logp; the label's own cotangent is 0."""
    if no_q and only_q and no_label:
        return Kind.NOTHING
    if no_q:
        return Kind.ONLY_P
    return Kind.ONLY_Q if only_q and not softcap else Kind.GENERAL  # a softcap's slope needs z whatever else is spared


def _fp16_scale(largest: float) -> float:
    """The power of two that lifts dz clear of fp16's underflow: |dz| <= (|g_logp| + |g_kl|) |logit_scale|."""
    return 2.0 ** math.floor(math.log2(FP16_HEADROOM / largest)) if 0 < largest < math.inf else 1.0


class LabelColumn:
    """Where each row's label falls in a block of columns, if it does. The whole vocabulary has them all."""

    def __init__(self, labels_R: Tensor, cols: slice, vocab: int) -> None:
        if cols.stop - cols.start == vocab:
            self.inside, self.index = None, labels_R[:, None]
            return
        self.inside = (labels_R >= cols.start) & (labels_R < cols.stop)
        self.index = (labels_R - cols.start).clamp_(0, cols.stop - cols.start - 1)[:, None]

    def read(self, tile: Tensor) -> Tensor:
        """The tile's value at each row's label; anything where the label is elsewhere."""
        return tile.gather(1, self.index)[:, 0]

    def pick(self, tiles_2RC: Tensor, otherwise_2R: Tensor | None) -> Tensor:
        """Both tiles' values at the labels, and `otherwise` (None: anything) in rows whose label is elsewhere."""
        found_2R = tiles_2RC.gather(2, self.index.expand(2, -1, 1))[..., 0]
        if self.inside is None or otherwise_2R is None:
            return found_2R
        return torch.where(self.inside, found_2R, otherwise_2R)

    def take_(self, tile: Tensor) -> Tensor:
        """The tile's value at each row's label, and 0 left there; 0 where the label is elsewhere."""
        value_R = self.read(tile)
        left_R = torch.zeros_like(value_R) if self.inside is None else value_R.masked_fill(self.inside, 0.0)
        tile.scatter_(1, self.index, left_R[:, None])
        return value_R - left_R

    def write_(self, tile: Tensor, value_R: Tensor) -> None:
        if self.inside is not None:
            value_R = torch.where(self.inside, value_R, self.read(tile))
        tile.scatter_(1, self.index, value_R[:, None])


def from_stage(
    c: Coefficients, kind: Kind, rows: slice, staged: StagedTile, label: LabelColumn, dz: Tensor, scratch: Tensor
) -> Tensor:
    """dz of a staged tile into `dz`. Torch's addcmul does not vectorise rows' values."""
    _from_log_ratio(staged, kind, block_of(c.a, rows), block_of(c.b, rows), dz, scratch)
    label.write_(dz, block_of(c.label, rows))
    return dz if staged.slope is None else dz.mul_(staged.slope)


def _from_log_ratio(staged: StagedTile, kind: Kind, a: Tensor, b: Tensor, dz: Tensor, scratch: Tensor) -> None:
    """``p (of_p + a e^x)``, x = log(q / p), which is ``p (rest + a expm1(x))``: the latter where the models agree, the
    former where of_p is nearly nothing, as where all but the reference hates a part, and q all that there is."""
    (p, t), (weight, ref_weight, ratio) = staged.pair.unbind(), staged.row_values.unbind()
    rest, of_p = torch.addcmul(b * weight, a, ref_weight - weight), (b - a) * weight
    if kind is Kind.ONLY_P:
        torch.mul(p, rest[:, None], out=dz)
        return
    x, a = torch.sub(-ratio[:, None], t, out=dz), a * ref_weight
    of_q = of_p.abs() < rest.abs() / 4
    if of_q.device.type != "cpu" or of_q.any():  # others would have to be waited for
        torch.expm1(x, out=scratch)
        torch.where(of_q[:, None], x.exp_(), scratch, out=dz)
        rest = torch.where(of_q, of_p, rest)
    else:
        x.expm1_()
    dz.mul_(a[:, None]).add_(rest[:, None]).mul_(p)


def from_p(c: Coefficients, rows: slice, z: Tensor, label: LabelColumn) -> Tensor:
    return _softmax_only_(z, 0, c, rows, label)


def from_q(c: Coefficients, rows: slice, r: Tensor, label: LabelColumn) -> Tensor:
    return _softmax_only_(r, 1, c, rows, label)


def _softmax_only_(x: Tensor, model: int, c: Coefficients, rows: slice, label: LabelColumn) -> Tensor:
    x.sub_(c.tops_2T[model, rows, None]).sub_(c.lse_2T[model, rows, None]).exp_().mul_(c.b[rows, None])
    label.write_(x, c.label[rows])
    return x


def from_both(c: Coefficients, rows: slice, logits_2RC: Tensor, label: LabelColumn, scratch: Tensor) -> Tensor:
    """dz from recomputed logits, which are used up, into `scratch`. p - q is had by (8) of `tile_math`."""
    half_y, left_2R = half_log_ratio_(logits_2RC, c.tops_2T[:, rows], c.lse_diff[rows], scratch)
    p, q = logits_2RC.sub_(left_2R[..., None]).sub_(c.lse_2T[:, rows, None]).exp_().unbind()
    dz = half_y.tanh_().mul_(q.add_(p)).mul_(-c.a[rows, None]).add_(p.mul_(c.b[rows, None]))
    label.write_(dz, c.label[rows])
    return dz
