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
from .slab import Grid, StagedTile
from .tile_math import largest_exponent, weigh_

FP16_HEADROOM = 2.0**14  # |dz| is scaled to stay below it


class Kind(Enum):
    """What a row block's cotangents leave to compute."""

    NOTHING = 0
    ONLY_P = 1
    ONLY_Q = 2
    GENERAL = 3


class Coefficients:
    """Per-row coefficients of eq. (6), and each row block's kind, read from the device in one go."""

    def __init__(
        self, inputs: Inputs, grid: Grid, row_values: tuple[Tensor, ...], g_logp_T: Tensor | None, g_kl_T: Tensor | None
    ) -> None:
        self.lse_z, self.lse_r, self.lse_diff, self.z_anchor, self.r_anchor, logp, ref_logp = row_values
        g_logp = torch.zeros_like(logp) if g_logp_T is None else g_logp_T.to(logp.dtype)
        g_kl = torch.zeros_like(logp) if g_kl_T is None else g_kl_T.to(logp.dtype)
        self.kinds = _kinds(grid, g_logp, g_kl, inputs.policy.head.softcap is not None, g_kl_T is None)
        self.scale = _fp16_scale(g_logp, g_kl) if inputs.policy.dtype == torch.float16 else 1.0
        factor = self.scale * inputs.policy.head.logit_scale
        self.a, self.b = g_kl * -factor, g_logp * -factor
        only_q = g_kl == g_logp
        self.label_constant = self.b * torch.expm1(torch.where(only_q, ref_logp, logp))
        a = torch.where(only_q, 0.0, self.a)
        self.label_near, self.label_far = a * logp.exp(), a * (ref_logp.exp() - logp.exp())

    def label(self, rows: slice, ratio_R: Tensor) -> Tensor:
        """dz at the label, from expm1(delta') there: p expm1(delta') where that is accurate, q - p where it
        overflows."""
        near = self.label_near[rows] * ratio_R
        return self.label_constant[rows] + torch.where(ratio_R.abs() < 1, near, self.label_far[rows])


def _kinds(grid: Grid, g_logp: Tensor, g_kl: Tensor, softcap: bool, no_kl: bool) -> list[Kind]:
    """The kind of each row block: one read from the device."""
    count = len(grid.row_blocks())
    if count == 0:
        return []
    if g_kl.is_cuda and torch.cuda.is_current_stream_capturing():
        return [Kind.ONLY_P if no_kl else Kind.GENERAL] * count
    no_q, no_p = g_kl == 0, g_kl == g_logp
    needed_3T = torch.stack([~no_q, ~no_p, (g_logp != 0) | ~no_q])
    if grid.T < count * grid.R:
        needed_3T = F.pad(needed_3T, (0, count * grid.R - grid.T))
    needs_q, needs_p, needs_any = needed_3T.view(3, count, grid.R).any(-1).tolist()
    kinds = []
    for q, p, anything in zip(needs_q, needs_p, needs_any, strict=True):
        # a softcap's slope needs z whatever else is needed
        kind = Kind.ONLY_P if not q else Kind.ONLY_Q if not p and not softcap else Kind.GENERAL
        kinds.append(kind if anything else Kind.NOTHING)
    return kinds


def _fp16_scale(g_logp: Tensor, g_kl: Tensor) -> float:
    """The power of two that lifts dz clear of fp16's underflow: |dz| <= |g_logp| + |g_kl|."""
    if g_kl.numel() == 0 or (g_kl.is_cuda and torch.cuda.is_current_stream_capturing()):
        return 1.0
    largest = (g_logp.abs() + g_kl.abs()).amax().item()
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

    def pick(self, tile: Tensor, otherwise_R: Tensor) -> Tensor:
        value_R = self.read(tile)
        return value_R if self.inside is None else torch.where(self.inside, value_R, otherwise_R)

    def write_(self, tile: Tensor, value_R: Tensor) -> None:
        if self.inside is not None:
            value_R = torch.where(self.inside, value_R, self.read(tile))
        tile.scatter_(1, self.index, value_R[:, None])


def from_stage(c: Coefficients, kind: Kind, rows: slice, staged: StagedTile, label: LabelColumn, dz: Tensor) -> Tensor:
    """dz of a staged tile into `dz`. The tile's own weight is made like its columns' p, by `tile_math.weigh_`."""
    ratio = (staged.offset - c.lse_diff[rows]).clamp_(min=-largest_exponent(dz.dtype))
    weight, ref_weight = (staged.lse_z - c.lse_z[rows]).exp(), (staged.lse_r - c.lse_r[rows]).exp()
    weigh_(weight, ref_weight, ratio, scratch=torch.empty_like(ratio))
    a, b = c.a[rows] * weight, c.b[rows] * weight
    if kind is Kind.ONLY_P:
        torch.mul(staged.p, b[:, None], out=dz)
        label.write_(dz, c.label_constant[rows])
    else:
        torch.sub(-ratio[:, None], staged.t, out=dz).expm1_()
        value = c.label(rows, label.read(dz))
        dz.mul_(a[:, None]).add_(b[:, None]).mul_(staged.p)
        label.write_(dz, value)
    return dz if staged.slope is None else dz.mul_(staged.slope)


def from_p(c: Coefficients, rows: slice, z: Tensor, label: LabelColumn) -> Tensor:
    return _softmax_only_(z, c.lse_z[rows], c, rows, label)


def from_q(c: Coefficients, rows: slice, r: Tensor, label: LabelColumn) -> Tensor:
    return _softmax_only_(r, c.lse_r[rows], c, rows, label)


def _softmax_only_(x: Tensor, lse: Tensor, c: Coefficients, rows: slice, label: LabelColumn) -> Tensor:
    x.sub_(lse[:, None]).exp_().mul_(c.b[rows, None])
    label.write_(x, c.label_constant[rows])
    return x


def from_both(c: Coefficients, rows: slice, z: Tensor, r: Tensor, label: LabelColumn, scratch: Tensor) -> Tensor:
    """dz from recomputed logits, into `scratch`; uses up z and r.

    ``q - p = p expm1(min(delta', 1)) + relu(q - e p)``: right where p and q agree, and where q is far above p.
    """
    ratio = torch.sub(r, z, out=scratch).add_(c.lse_diff[rows, None]).clamp_(max=1.0).expm1_()
    value = c.label(rows, label.read(ratio))
    p, q = z.sub_(c.lse_z[rows, None]).exp_(), r.sub_(c.lse_r[rows, None]).exp_()
    difference = ratio.mul_(p).add_(q.sub_(p, alpha=math.e).clamp_(min=0.0))
    dz = difference.mul_(c.a[rows, None]).add_(p.mul_(c.b[rows, None]))
    label.write_(dz, value)
    return dz
