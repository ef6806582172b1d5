"""The kernels of `device/`, launched as a backend would but small, on inputs that lie among NaN."""

from __future__ import annotations

from typing import Any

import torch
from exact_dz import Backward
from exact_problems import C, K, Problem, R
from harness import F32, TensorDescriptor, launch, poisoned, power_of_2, strided
from torch import Tensor

from tdpo_kernels.device import dlogits, merge, rows, stats

STATE, ROWS = int(stats.STATE.value), int(merge.ROWS.value)
KEPT = 10  # numbers of a state that do not depend on staging


def operands(p: Problem, tma: bool) -> tuple[list[Any], dict[str, int]]:
    """h, w, g, u with NaN between their rows, and their strides."""
    h, w, g = strided(p.h), strided(p.w, 16), strided(p.g, _room(p.g, 8))
    u = w if p.u is p.w else strided(p.u, _room(p.u, 16))
    matrices = {"h": h, "w": w, "g": g, "u": u}
    strides = {f"stride_{name}": x.stride(0) for name, x in matrices.items()}
    if tma:
        boxes = dict(h=[R, K], g=[R, K], w=[C, K], u=[C, K])
        return [_descriptor(x, boxes[name]) for name, x in matrices.items()], strides
    return list(matrices.values()), strides


def _room(x: Tensor, more: int) -> int:
    """Some columns more, to where a row begins at a multiple of 16 bytes in every dtype."""
    return more + -x.shape[1] % 8


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    room = 16 // x.element_size()
    assert x.data_ptr() % 16 == 0 and x.stride(0) % room == 0
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def planes(p: Problem, cols: int, dtype: torch.dtype) -> Tensor:
    """p, t and a softcap's slope, with room between the rows."""
    return poisoned(2 if p.softcap is None else 3, p.T, cols + 8, dtype=dtype)


def dz_of(p: Problem, cols: int, dtype: torch.dtype = F32) -> Tensor:
    return poisoned(p.T, cols + 8, dtype=dtype)


def products(p: Problem, first: int, last: int) -> tuple[Tensor, Tensor]:
    return tuple(strided((x.double() @ y[first:last].double().T).float()) for x, y in ((p.h, p.w), (p.g, p.u)))


# --- statistics -------------------------------------------------------------------------------------------------------


def fused_stats(
    p: Problem,
    staged: Tensor | None = None,
    cols: tuple[int, int] | None = None,
    tma: bool = False,
    programs: int | None = None,
) -> Tensor:
    """`programs`: so many take the tiles in turns."""
    first, last = cols or (0, p.V)
    parts = -(-(last - first) // C)
    states = poisoned(parts + 1, STATE, p.T)  # one more than is meant to be written
    (h, w, g, u), strides = operands(p, tma)
    stride_p, plane = (0, 0) if staged is None else (staged.stride(1), staged.stride(0))
    grid = (programs,) if programs else (-(-p.T // R), parts)
    launch(
        stats.fused_stats, grid, h, w, p.bias, g, u, p.ref_bias, p.labels, states[:parts], staged,
        p.T, p.V, p.h.shape[1], p.g.shape[1], first, last, stride_p=stride_p, plane=plane, F=p.F,
        R=R, C=C, K=K, TMA=tma, PRECISION="ieee", ONE_HEAD=p.u is p.w, STAGE=staged is not None, EXTRAS=True,
        PERSISTENT=programs is not None, **strides, **p.heads(), **p.flags(),
    )  # fmt: skip
    assert states[parts:].isnan().all()
    return states[:parts]


def tile_stats(p: Problem, cols: tuple[int, int] | None = None, staged: Tensor | None = None) -> Tensor:
    """From products that lie in memory; one part."""
    first, last = cols or (0, p.V)
    z, r = products(p, first, last)
    states = poisoned(1, STATE, p.T)
    stride_p, plane = (0, 0) if staged is None else (staged.stride(1), staged.stride(0))
    launch(
        rows.tile_stats, (-(-p.T // R),), z, p.bias, r, p.ref_bias, p.labels, states, staged,
        p.T, p.V, first, last, z.stride(0), stride_p=stride_p, plane=plane, F=p.F,
        R=R, C=power_of_2(last - first), STAGE=staged is not None, EXTRAS=True, **p.heads(), **p.flags(),
    )  # fmt: skip
    return states


def merge_states(p: Problem, states: Tensor, staged: int = 0) -> tuple[Tensor, Tensor]:
    """Row values ``(ROWS, stride)``, and the staged tiles' weights ``(staged, 2, stride)``."""
    stride = p.T + 3
    out, weights = poisoned(ROWS + 1, stride), poisoned(staged + 1, 3, stride)
    launch(
        merge.merge_states, (-(-p.T // R),), states, out[:ROWS], weights[:staged] if staged else weights,
        p.T, len(states), staged, stride, stride, R=R, EXTRAS=True,
    )  # fmt: skip
    assert out[ROWS:].isnan().all() and out[:, p.T :].isnan().all()
    assert weights[staged:].isnan().all() and weights[..., p.T :].isnan().all()
    return out[:ROWS], weights[:staged]


def row_values(p: Problem) -> Tensor:
    return merge_states(p, tile_stats(p))[0]


# --- dz ---------------------------------------------------------------------------------------------------------------


def fused_dz(
    p: Problem, values: Tensor, want: Backward, cols: tuple[int, int], tma: bool, dtype: torch.dtype = F32,
    programs: int | None = None,
) -> Tensor:  # fmt: skip
    first, last = cols
    out = dz_of(p, last - first, dtype)
    (h, w, g, u), strides = operands(p, tma)
    grid = (programs,) if programs else (-(-p.T // R), -(-(last - first) // C))
    launch(
        dlogits.fused_dz, grid, h, w, p.bias, g, u, p.ref_bias, p.labels, values,
        want.coefficients, out, p.T, p.V, p.h.shape[1], p.g.shape[1], first, last, **strides,
        stride_rows=values.stride(0), stride_dz=out.stride(0), R=R, C=C, K=K, TMA=tma, PRECISION="ieee",
        PERSISTENT=programs is not None, **p.heads(), **p.flags(),
    )  # fmt: skip
    return out


def tile_dz(p: Problem, values: Tensor, want: Backward, cols: tuple[int, int], needs_z: bool, needs_r: bool) -> Tensor:
    first, last = cols
    z, r = products(p, first, last)
    out = dz_of(p, last - first)
    launch(
        rows.tile_dz, (-(-p.T // R),), z if needs_z else None, p.bias, r if needs_r else None, p.ref_bias, p.labels,
        values, want.coefficients, out, p.T, p.V, first, last, z.stride(0), values.stride(0), out.stride(0),
        R=R, C=power_of_2(last - first), NEEDS_Z=needs_z, NEEDS_R=needs_r, **p.heads(), **p.flags(),
    )  # fmt: skip
    return out


def staged_dz(p: Problem, want: Backward, cols: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Staged from cols[0] to cols[1], the rest of the columns as further parts; dz of the staged ones."""
    first, last = cols
    staged = planes(p, last - first, dtype)
    states = [fused_stats(p, staged, cols)]
    states += [fused_stats(p, cols=c) for c in ((0, first), (last, p.V)) if c[0] < c[1]]
    _, weights = merge_states(p, torch.cat(states), len(states[0]))
    out = dz_of(p, last - first)
    launch(
        dlogits.staged_dz, (-(-p.T // R), -(-(last - first) // C)), staged, weights, p.labels, want.coefficients, out,
        p.T, first, last, staged.stride(1), staged.stride(0), want.coefficients.stride(0), out.stride(0), C,
        R=R, C=C, HAS_SOFTCAP=p.softcap is not None,
    )  # fmt: skip
    return out


def windows(p: Problem) -> list[tuple[int, int]]:
    return [(0, p.V), *([(20, 70)] if p.V > 70 else [])]
