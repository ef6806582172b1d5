"""Library products into cache-sized tiles, row mathematics in torch between them. Runs on any torch device; never
``[T, V]``.

Forward, row blocks outside: both logits tiles, their parts (`tile_math.py`), one merge per row block. Backward: each
tile's dz
(`dlogits.py`) from the stage or from recomputed logits, then the products (7) (`products.py`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..types import Forward, Gradients, Inputs, LMHead, Needs
from . import dlogits, tile_math
from .dlogits import Coefficients, Kind, LabelColumn
from .products import GradientSum, logits_
from .slab import Grid, Side, Stage, StagedTile, Workspace, blocks, make_grid


def forward(inputs: Inputs, needs: Needs) -> Forward:
    grid, work = make_grid(inputs), Workspace(inputs.policy.hidden.device)
    sides = _sides(inputs, work)
    stage = Stage(inputs, grid) if needs else None
    collected: dict[str, list[Tensor]] = {}
    for i, rows, _ in blocks(grid.row_blocks()):
        for name, value_R in _row_block(inputs, grid, sides, stage, i, rows).items():
            collected.setdefault(name, []).append(value_R)

    def whole(name: str) -> Tensor:
        parts = collected.get(name) or [inputs.policy.hidden.new_empty(0, dtype=inputs.stats_dtype)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    logp, ref_logp = whole("logp"), whole("ref_logp")
    saved = ()
    if stage:
        rows = [whole(name) for name in ("lse_z", "lse_r", "lse_diff", "z_anchor", "r_anchor")]
        saved = (*rows, logp, ref_logp, stage.flat, stage.row_values)
    shown = [logp, ref_logp, whole("kl"), *(whole(name) for name in inputs.extras)]
    if _can_rule_out(inputs):
        shown = [tile_math.to_infinity(x) for x in shown]
    return Forward(*shown[:3], dict(zip(inputs.extras, shown[3:], strict=True)), saved)


def _can_rule_out(inputs: Inputs) -> bool:
    """Only a bias can put an entry at -inf."""
    return inputs.policy.head.bias is not None or inputs.reference.head.bias is not None


def _row_block(
    inputs: Inputs, grid: Grid, sides: tuple[Side, Side], stage: Stage | None, i: int, rows: slice
) -> dict[str, Tensor]:
    """Every statistic of one block of rows, over the whole vocabulary."""
    policy, reference = sides
    labels_R = inputs.rows.labels_T[rows]
    R, columns = labels_R.numel(), grid.col_blocks()
    parts_4KR = torch.empty(4, len(columns), R, dtype=inputs.stats_dtype, device=labels_R.device)
    z_y, r_y = parts_4KR.new_zeros(2, R)
    infinite = parts_4KR.new_zeros(R, dtype=torch.bool) if inputs.policy.head.bias is not None else None
    for k, cols, C in blocks(columns):
        z, r = _tile(policy, rows, cols), _tile(reference, rows, cols)
        if k == 0:
            z_anchor, r_anchor = tile_math.anchor(z), tile_math.anchor(r)
            extras = tile_math.Extras(z_anchor) if inputs.extras else None
        staged = stage.tile(i, k, R, C) if stage else None
        if staged is not None and staged.slope is not None:
            staged.slope.copy_(_softcap_slope(z, inputs.policy.head.softcap, policy.work.get("slope", R, C, z.dtype)))
        z.sub_(z_anchor[:, None])
        r.sub_(r_anchor[:, None])
        label = LabelColumn(labels_R, cols, grid.V)
        z_y, r_y = label.pick(z, z_y), label.pick(r, r_y)
        if infinite is not None:
            infinite |= (tile_math.is_lowest(z) & ~tile_math.is_lowest(r)).any(-1)
        parts_4KR[:, k] = _part(inputs, z, r, staged, policy.work, extras)
    state = tile_math.merge(parts_4KR)
    found = dict(vars(state), logp=z_y - state.lse_z, ref_logp=r_y - state.lse_r, z_anchor=z_anchor, r_anchor=r_anchor)
    if infinite is not None:
        found["kl"].masked_fill_(infinite, math.inf)
    return found if extras is None else found | extras.results(state.lse_z, z_y, grid.V)


def _part(
    inputs: Inputs, z: Tensor, r: Tensor, staged: StagedTile | None, work: Workspace, extras: tile_math.Extras | None
) -> Tensor:
    """``(4, R)``: the part's lse_z, lse_r, mu, M. Fills `staged`; z and r are used up."""
    direct = staged is not None and staged.p.dtype == z.dtype
    p, y = (staged.p, staged.t) if direct else (work.get(name, *z.shape, z.dtype) for name in ("p", "y"))
    q = work.get("q", *z.shape, z.dtype)
    lse_z, lse_r = tile_math.softmax_(z, out=p), tile_math.softmax_(r, out=q)
    if inputs.reference.head.bias is not None:  # a part that the reference rules out altogether has no q
        q.masked_fill_(tile_math.is_lowest(lse_r)[:, None], 0.0)
    if extras is not None:
        extras.add(z, p, lse_z)
    mean, phi = tile_math.divergence_(z, r, p, q, y, lse_z, lse_r)
    if staged is not None:
        staged.offset.copy_(tile_math.log_ratio_(y, lse_z, lse_r, mean, phi))
        staged.lse_z.copy_(lse_z)
        staged.lse_r.copy_(lse_r)
        if not direct:  # p is to make up for the rounding of t
            staged.t.copy_(y)
            y.copy_(staged.t)
        tile_math.weigh_(p, q, y, scratch=z)
        if not direct:
            staged.p.copy_(p)
    return torch.stack([lse_z, lse_r, mean, phi])


def backward(
    inputs: Inputs, needs: Needs, saved: tuple[Tensor | None, ...], g_logp_T: Tensor | None, g_kl_T: Tensor | None
) -> Gradients:
    *row_values, flat, stage_rows = saved
    grid, work = make_grid(inputs), Workspace(inputs.policy.hidden.device)
    sides, stage = _sides(inputs, work), Stage(inputs, grid, flat, stage_rows)
    coefficients = Coefficients(inputs, grid, tuple(row_values), g_logp_T, g_kl_T)
    rows, cols = list(blocks(grid.row_blocks())), list(blocks(grid.col_blocks()))
    sums = _Sums(inputs, grid, needs, sides[0], coefficients.scale)
    for outer in cols if sums.columns_outer else rows:
        for inner in rows if sums.columns_outer else cols:
            (i, row, R), (k, col, C) = (inner, outer) if sums.columns_outer else (outer, inner)
            kind = coefficients.kinds[i]
            if kind is not Kind.NOTHING:
                sums.add(_dz(inputs, coefficients, sides, stage.tile(i, k, R, C), kind, row, col), row, col)
        sums.close_outer(outer[1])
    return sums.close_inner()


def _dz(
    inputs: Inputs,
    c: Coefficients,
    sides: tuple[Side, Side],
    staged: StagedTile | None,
    kind: Kind,
    rows: slice,
    cols: slice,
) -> Tensor:
    """The gradient at the outputs of ``h W^T + b`` for one tile: eq. (6), through softcap and logit_scale."""
    policy, reference = sides
    label = LabelColumn(inputs.rows.labels_T[rows], cols, inputs.policy.head.weight.shape[0])
    if staged is not None:
        dz = policy.work.get("z", *staged.p.shape, c.a.dtype)
        return dlogits.from_stage(c, kind, rows, staged, label, dz)
    if kind is Kind.ONLY_Q:
        return dlogits.from_q(c, rows, _tile(reference, rows, cols).sub_(c.r_anchor[rows, None]), label)
    z = _tile(policy, rows, cols)
    softcap = inputs.policy.head.softcap
    slope = None if softcap is None else _softcap_slope(z, softcap, policy.work.get("slope", *z.shape, z.dtype))
    z.sub_(c.z_anchor[rows, None])
    if kind is Kind.ONLY_P:
        dz = dlogits.from_p(c, rows, z, label)
    else:
        r = _tile(reference, rows, cols).sub_(c.r_anchor[rows, None])
        dz = dlogits.from_both(c, rows, z, r, label, policy.work.get("y", *z.shape, z.dtype))
    return dz if slope is None else dz.mul_(slope)


class _Sums:
    """The gradients under construction. The columns go outside unless dW is not wanted or its fp32 sum is the larger
    of the two."""

    def __init__(self, inputs: Inputs, grid: Grid, needs: Needs, policy: Side, scale: float) -> None:
        self.policy, self.needs, self.alpha, dtype = policy, needs, 1.0 / scale, inputs.stats_dtype
        self.columns_outer = needs.weight and grid.T <= grid.V
        hidden, head = inputs.policy.hidden, inputs.policy.head
        held_rows, held_cols = (grid.T, grid.C) if self.columns_outer else (grid.R, grid.V)
        self.bias_sum = hidden.new_zeros(grid.V, dtype=dtype) if needs.bias else None
        self.bias_dtype = head.weight.dtype
        self.hidden = GradientSum(hidden, inputs.rows.hidden_T, dtype, held_rows) if needs.hidden else None
        self.weight = GradientSum(head.weight, None, dtype, held_cols) if needs.weight else None
        self.row_blocks, self.col_blocks = grid.row_blocks(), grid.col_blocks()

    def add(self, dz_RC: Tensor, rows: slice, cols: slice) -> None:
        if self.bias_sum is not None:
            self.bias_sum[cols].add_(dz_RC.sum(0), alpha=self.alpha)
        policy, dtype = self.policy, self.policy.backward_dtype
        dz_RC = policy.gradient_operand(dz_RC)
        if self.hidden is not None:
            self.hidden.add(rows, dz_RC, policy.weight.block(cols, dtype), self.alpha)
        if self.weight is not None:
            self.weight.add(cols, dz_RC.T, policy.hidden.block(rows, dtype), self.alpha)

    def close_outer(self, block: slice) -> None:
        outer = self.weight if self.columns_outer else self.hidden
        if outer is not None:
            outer.close(block)

    def close_inner(self) -> Gradients:
        inner, every = (self.hidden, self.row_blocks) if self.columns_outer else (self.weight, self.col_blocks)
        for block in every if inner is not None else ():
            inner.close(block)
        bias = None if self.bias_sum is None else self.bias_sum.to(self.bias_dtype)
        return Gradients(*(None if x is None else x.grad for x in (self.hidden, self.weight)), bias)


def _sides(inputs: Inputs, work: Workspace) -> tuple[Side, Side]:
    index = inputs.rows.hidden_T
    return (
        Side(inputs.policy, index, work, "z", inputs.stats_dtype),
        Side(inputs.reference, index, work, "r", inputs.stats_dtype),
    )


def _tile(side: Side, rows: slice, cols: slice) -> Tensor:
    """One tile of one model's logits, in the statistics' dtype, in the workspace."""
    out = side.work.get(side.name, rows.stop - rows.start, cols.stop - cols.start, side.stats)
    head = side.model.head
    logits_(
        out, side.hidden.block(rows, side.forward_dtype), side.weight.block(cols, side.forward_dtype), side.model.dtype
    )
    return _apply_head_(out, head, cols, side.model.dtype)


def _apply_head_(out: Tensor, head: LMHead, cols: slice, compute: torch.dtype) -> Tensor:
    """Bias, scale and softcap. Only a bias can rule an entry out: there -inf becomes `tile_math.LOWEST`."""
    if head.bias is not None:
        out.add_(head.bias[cols].to(compute))
    if head.logit_scale != 1.0:
        out.mul_(head.logit_scale)
    if head.softcap is not None:
        out.mul_(1.0 / head.softcap).tanh_().mul_(head.softcap)
    return out if head.bias is None else out.clamp_(min=tile_math.LOWEST)


def _softcap_slope(z: Tensor, softcap: float, out: Tensor) -> Tensor:
    """d softcap * tanh(x / softcap) / dx = 1 - (z / softcap)^2."""
    return torch.mul(z, z, out=out).mul_(-1.0 / softcap**2).add_(1.0)
