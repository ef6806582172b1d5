"""Library products into cache-sized tiles, row mathematics in torch between them. Runs on any torch device; never
``[T, V]``.

Forward, row blocks outside: both logits tiles, their parts (`tile_math.py`), one merge per row block. Backward: each
tile's dz (`dlogits.py`) from the stage or from recomputed logits, then the products (7) (`sums.py`). Where Triton's
kernels run, they do the row mathematics (`rowwise.py`), but for float64. A call that is one tile of fp32 or float64
goes straight through (`one_tile.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Forward, Gradients, Inputs, Needs
from . import dlogits, kernel_walk, one_tile, rowwise, tile_math
from .dlogits import Coefficients, Kind, LabelColumn
from .products import block_of
from .rowwise import Rowwise
from .slab import Grid, Side, Stage, StagedTile, Workspace, blocks, make_grid, sides_of
from .sums import gradients

ROW_VALUES = ("tops_2R", "lse_2R", "logps_2R", "lse_diff", "label_ratio")  # what backward wants back of each row


def forward(inputs: Inputs, needs: Needs) -> Forward:
    if _by_kernels(inputs):
        return kernel_walk.forward(Rowwise(), inputs, needs)
    if one_tile.takes(inputs):
        return one_tile.forward(inputs, needs)
    grid, work = make_grid(inputs), Workspace(inputs.policy.hidden.device)
    sides = sides_of(inputs, work)
    stage = Stage(inputs, grid) if needs else None
    row_blocks = grid.row_blocks() or (slice(0, 0),)
    found = [_row_block(inputs, grid, sides, stage, i, rows) for i, rows, _ in blocks(row_blocks)]
    whole = found[0] if len(found) == 1 else {name: torch.cat([x[name] for x in found], -1) for name in found[0]}
    saved = (*(whole[name] for name in ROW_VALUES), stage.flat, stage.row_values) if stage else ()
    state = (*whole["tops_2R"], *whole["lse_2R"], whole["lse_diff"]) if inputs.partial else ()
    extras = {name: whole[name] for name in inputs.extras}
    return tile_math.finished(inputs, [*whole["logps_2R"].unbind(), whole["kl"]], extras, saved, state)


def _row_block(
    inputs: Inputs, grid: Grid, sides: tuple[Side, Side], stage: Stage | None, i: int, rows: slice
) -> dict[str, Tensor]:
    """Every statistic of one block of rows, over the whole vocabulary."""
    labels_R = block_of(inputs.rows.labels_T, rows)
    R, columns = labels_R.numel(), grid.col_blocks()
    work, dtype = sides[0].work, inputs.stats_dtype
    parts: list[tile_math.Part] = []
    kept: list[tile_math.Rounding | None] = []
    extras = tile_math.Extras() if inputs.extras else None
    labels_2R = None
    for k, cols, C in blocks(columns):
        tiles_2RC = work.get("tiles", dtype, 2, R, C)
        z, r = tiles_2RC.unbind()
        _tile(sides[0], rows, cols, z)
        _tile(sides[1], rows, cols, r)
        staged = stage.tile(i, k, R, C) if stage else None
        if staged is not None and staged.slope is not None:
            slope = tile_math.softcap_slope(z, inputs.policy.head.softcap, work.get("slope", dtype, R, C))
            staged.slope.copy_(slope)
        label = LabelColumn(labels_R, cols, grid.V)
        labels_2R = label.pick(tiles_2RC, labels_2R)
        part, wants = _part(tiles_2RC, z, r, staged, label, work, extras)
        parts.append(part)
        if staged is not None:
            kept.append(wants)
    state = tile_math.merge(parts)
    if kept:
        stage.rows_of(i, R).copy_(_tile_weights(kept, parts, state))
    labels_2R1 = labels_2R.clone()[..., None]
    half_y_R1, _ = tile_math.half_log_ratio_(labels_2R1, state.tops_2R, state.lse_diff, labels_2R1[1])
    logps_2R, label_ratio = labels_2R - state.tops_2R - state.lse_2R, half_y_R1[:, 0] * -2.0
    found = state._asdict() | dict(logps_2R=logps_2R, label_ratio=label_ratio)
    return found if extras is None else found | extras.results(state.tops_2R[0], state.lse_2R[0], labels_2R[0], grid.V)


def _part(
    tiles_2RC: Tensor,
    z: Tensor,
    r: Tensor,
    staged: StagedTile | None,
    label: LabelColumn,
    work: Workspace,
    extras: tile_math.Extras | None,
) -> tuple[tile_math.Part, tile_math.Rounding | None]:
    """The part, and what 16 bits do to a staged tile. The logits are used up."""
    exact = staged is not None and staged.exact
    pair = staged.pair if exact else work.get("pair", tiles_2RC.dtype, *tiles_2RC.shape)
    tops_2R, lse_2R = tile_math.softmax(tiles_2RC, out=pair)
    p, q = pair.unbind()
    if extras is not None:
        extras.add(z, p, tops_2R[0], lse_2R[0], scratch=work.get("t", z.dtype, *z.shape))
    lse_diff = torch.sub(*lse_2R.unbind())
    half_y, _ = tile_math.half_log_ratio_(tiles_2RC, tops_2R, lse_diff, r)
    t = None if staged is None else torch.mul(half_y, 2.0, out=work.get("t", z.dtype, *z.shape))
    steep = staged is not None and (not exact or tile_math.is_steep(half_y))
    excess, kl = tile_math.divergence_(half_y, p, q, q, scratch=z)
    part = tile_math.Part(tops_2R, lse_2R, kl, lse_diff + excess)
    if staged is None:
        return part, None
    if steep:
        tile_math.subtract_(t, excess)
        return part, _weigh_(p, q, t, staged, label, scratch=z)
    torch.sub(t, excess[:, None], out=q)
    return part, None


def _weigh_(
    p: Tensor, p_less_q: Tensor, t: Tensor, staged: StagedTile, label: LabelColumn, scratch: Tensor
) -> tile_math.Rounding | None:
    """Stages p and t, p such that with t it says q, wherever that is above p."""
    q = torch.sub(p, p_less_q, out=p_less_q)
    if not staged.exact:
        return _round_(p, q, t, staged, label, scratch)
    tile_math.weigh_(p, q, t, scratch)
    q.copy_(t)
    return None


def _tile_weights(kept: list[tile_math.Rounding | None], parts: list[tile_math.Part], whole: tile_math.Part) -> Tensor:
    """Of the tiles that are staged, the first ones."""
    return tile_math.tile_weights([x for x in kept if x is not None], parts[: len(kept)], whole)


def _round_(
    p: Tensor, q: Tensor, t: Tensor, staged: StagedTile, label: LabelColumn, scratch: Tensor
) -> tile_math.Rounding:
    """Stages p and t in 16 bits, without the label's p, which backward has in full. p makes up for the rounding of t
    entry by entry, the tile's weights for what then is left of both in each row's sums."""
    of_label = label.take_(p), label.take_(q), -label.read(t)
    kept = p.sum(-1)
    staged_p, staged_t = staged.pair.unbind()
    t.copy_(staged_t.copy_(t))
    tile_math.weigh_(p, q, t, scratch)
    p.copy_(staged_p.copy_(p))
    return tile_math.rounding(p, t, kept, of_label, scratch)


def backward(
    inputs: Inputs,
    needs: Needs,
    saved: tuple[Tensor | None, ...],
    g_logp_T: Tensor | None,
    g_kl_T: Tensor | None,
    g_label_T: Tensor | None = None,
) -> Gradients:
    if _by_kernels(inputs):
        return kernel_walk.backward(Rowwise(), inputs, needs, saved, g_logp_T, g_kl_T, g_label_T)
    if one_tile.takes(inputs):
        return one_tile.backward(inputs, needs, saved, g_logp_T, g_kl_T)
    *row_values, flat, stage_rows = saved
    grid, work = make_grid(inputs), Workspace(inputs.policy.hidden.device)
    sides, stage = sides_of(inputs, work), Stage(inputs, grid, flat, stage_rows)
    c = Coefficients(inputs, grid, tuple(row_values), g_logp_T, g_kl_T, g_label_T)

    def dz(i: int, rows: slice, k: int, cols: slice) -> Tensor | None:
        if c.kinds[i] is Kind.NOTHING:
            return None
        staged = stage.tile(i, k, rows.stop - rows.start, cols.stop - cols.start)
        return _dz(inputs, c, sides, staged, c.kinds[i], rows, cols)

    return gradients(inputs, grid, needs, sides[0], c.scale, dz, inputs.memory_budget - stage.flat.nbytes)


def _by_kernels(inputs: Inputs) -> bool:
    return inputs.stats_dtype == torch.float32 and rowwise.runs_on(inputs.policy.hidden.device)


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
    label = LabelColumn(block_of(inputs.rows.labels_T, rows), cols, inputs.policy.head.weight.shape[0])
    R, C = rows.stop - rows.start, cols.stop - cols.start
    work, dtype = policy.work, inputs.stats_dtype
    tiles_2RC, y = work.get("tiles", dtype, 2, R, C), work.get("y", dtype, R, C)
    z, r = tiles_2RC.unbind()
    if staged is not None:
        return dlogits.from_stage(c, kind, rows, staged, label, z, y)
    if kind is Kind.ONLY_Q:
        return dlogits.from_q(c, rows, _tile(reference, rows, cols, r), label)
    _tile(policy, rows, cols, z)
    softcap = inputs.policy.head.softcap
    slope = None if softcap is None else tile_math.softcap_slope(z, softcap, work.get("slope", dtype, R, C))
    if kind is Kind.ONLY_P:
        dz = dlogits.from_p(c, rows, z, label)
    else:
        _tile(reference, rows, cols, r)
        dz = dlogits.from_both(c, rows, tiles_2RC, label, y)
    return dz if slope is None else dz.mul_(slope)


def _tile(side: Side, rows: slice, cols: slice, out: Tensor) -> Tensor:
    """One tile of one model's logits, in the statistics' dtype."""
    head = side.model.head
    bias = None if head.bias is None else head.bias[cols].to(side.model.dtype)
    return tile_math.apply_head_(side.products(rows, cols, out), head, bias)
