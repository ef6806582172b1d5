"""The kernels of `device/`, launched as a backend would but small, against the scalar oracle.

Products are of numbers on a grid so coarse that fp32 sums them exactly, in any order: the logits are the truth's, and
what is off is row mathematics, an address or a mask. Inputs lie among NaN, and every address is checked.
"""

from __future__ import annotations

import math
import mmap
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import oracle
import pytest
import torch
from harness import (
    EPS,
    F16,
    F32,
    F64,
    Row,
    TensorDescriptor,
    close,
    launch,
    on_grid,
    poisoned,
    power_of_2,
    row,
    strided,
)  # fmt: skip
from runnable import mainly
from torch import Tensor

from tdpo_kernels.backends.tile_math import LOWEST, largest_exponent
from tdpo_kernels.device import dlogits, merge, rows, stats

R, C, K = 16, 32, 16
STATE, ROWS = int(stats.STATE.value), int(merge.ROWS.value)
BF16 = torch.bfloat16
KEPT = 10  # numbers of a state that do not depend on staging


@dataclass(frozen=True)
class Problem:
    h: Tensor
    w: Tensor
    g: Tensor
    u: Tensor
    labels: Tensor
    bias: Tensor | None = None
    ref_bias: Tensor | None = None
    scale: float = 1.0
    ref_scale: float = 1.0
    softcap: float | None = None
    ref_softcap: float | None = None

    @property
    def T(self) -> int:
        return len(self.labels)

    @property
    def V(self) -> int:
        return len(self.w)

    @property
    def dtype(self) -> torch.dtype:
        return self.h.dtype

    @property
    def F(self) -> float:
        return largest_exponent(F32)

    @cached_property
    def logits(self) -> tuple[Tensor, Tensor]:
        """float64, and fp32 holds them unless there is a softcap."""
        return tuple(
            _head(x.double() @ y.double().T, b, s, c)
            for x, y, b, s, c in (
                (self.h, self.w, self.bias, self.scale, self.softcap),
                (self.g, self.u, self.ref_bias, self.ref_scale, self.ref_softcap),
            )
        )

    @cached_property
    def true(self) -> list[Row]:
        return self.truth(slice(0, self.V))

    def truth(self, columns: slice) -> list[Row]:
        z, r = self.logits
        return [row(z[i, columns], r[i, columns]) for i in range(self.T)]

    @cached_property
    def slope(self) -> Tensor:
        z = self.logits[0]
        return torch.ones_like(z) if self.softcap is None else 1 - (z / self.softcap) ** 2

    @property
    def loss(self) -> float:
        """What a softcap makes of exact products: eps of the logits' size."""
        return 8 * EPS * max([0.0, *(c for c in (self.softcap, self.ref_softcap) if c is not None)])

    def heads(self) -> dict[str, Any]:
        return dict(
            scale=self.scale,
            softcap=self.softcap or 1e-9,
            ref_scale=self.ref_scale,
            ref_softcap=self.ref_softcap or 1e-9,
        )

    def flags(self) -> dict[str, bool]:
        return dict(
            HAS_BIAS=self.bias is not None, HAS_SOFTCAP=self.softcap is not None,
            HAS_REF_BIAS=self.ref_bias is not None, HAS_REF_SOFTCAP=self.ref_softcap is not None,
        )  # fmt: skip


def _head(x: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    x = (x if bias is None else x + bias.double()) * scale
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    return torch.where(x == -math.inf, LOWEST, x)


def problem(
    T: int = 21,
    V: int = 86,
    D: int = 24,
    E: int = 20,
    apart: float | None = None,
    dtype: torch.dtype = F32,
    seed: int = 0,
) -> Problem:
    """D and E are no multiples of K, T none of R, V none of C: 3 tiles, the last of 22 columns. With `apart` the
    reference is the policy, but for a bias of that size."""
    gen = torch.Generator().manual_seed(seed)

    def grid(*shape: int, step: float = 1 / 8) -> Tensor:
        return on_grid(torch.randn(*shape, generator=gen, dtype=F64), step).clamp(-3, 3).to(dtype)

    h, w = grid(T, D), on_grid(grid(V, D).double() / 2, 1 / 8).to(dtype)
    labels = torch.randint(0, V, (T,), generator=gen)
    edges = [0, V - 1, C - 1, C, V - V % C]
    labels[:5] = torch.tensor(edges)[:T] % V
    if apart is not None:
        ref_bias = on_grid(apart * torch.randn(V, generator=gen, dtype=F64), 2.0**-16).float()
        return Problem(h, w, h.clone(), w, labels, ref_bias=ref_bias)
    return Problem(h, w, grid(T, E), on_grid(grid(V, E).double() / 2, 1 / 8).to(dtype), labels)


def one_head(p: Problem) -> Problem:
    """The same weight, other hidden states."""
    g = (p.h.double() + p.h.double().roll(3, 0) / 4).clamp(-3, 3)
    return replace(p, g=on_grid(g, 1 / 8).to(p.dtype), u=p.w)


def biased(p: Problem, out: tuple[int, ...] = ()) -> Problem:
    gen = torch.Generator().manual_seed(2)
    bias, ref_bias = (on_grid(torch.randn(p.V, generator=gen, dtype=F64), 1 / 8).to(p.dtype) for _ in range(2))
    bias[list(out)], ref_bias[list(out)] = -math.inf, -math.inf
    return replace(p, bias=bias, ref_bias=ref_bias)


PROBLEMS = {
    "plain": problem,
    "fp16": lambda: problem(dtype=F16),
    "near": lambda: problem(apart=2.0**-7),
    "near_offset": lambda: replace(p := problem(apart=2.0**-7), ref_bias=p.ref_bias + 32.0),
    "equal": lambda: problem(apart=0.0),
    "biased": lambda: replace(biased(problem()), scale=0.5, ref_scale=0.25),
    "ruled_out": lambda: _off_labels(biased(problem(), out=(*range(32, 64), 70, 85))),
    "softcap": lambda: replace(biased(problem()), softcap=8.0, ref_softcap=16.0, scale=0.5),
    "hated": lambda: _pushed(-104.0),
    "loved": lambda: _pushed(300.0),
    "one_row": lambda: problem(T=1, V=7, D=8, E=8),
    "multiples": lambda: problem(T=16, V=64, D=32, E=16),
}


def _off_labels(p: Problem) -> Problem:
    return replace(p, labels=torch.where(p.bias[p.labels].isinf(), 5, p.labels))


def _pushed(nats: float) -> Problem:
    p = problem()
    bias = torch.zeros(p.V)
    bias[[3, 85]] = nats
    return replace(p, bias=bias)


_made: dict[str, Problem] = {}


def made(name: str) -> Problem:
    """Each once: the truth costs more than the launches."""
    if name not in _made:
        p = PROBLEMS[name.removesuffix("+one_head")]()
        if name.endswith("+one_head"):
            p = one_head(p)
        _made[name] = p
    return _made[name]


# --- launches ---------------------------------------------------------------------------------------------------------


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


def products(p: Problem, first: int, last: int) -> tuple[Tensor, Tensor]:
    return tuple(strided((x.double() @ y[first:last].double().T).float()) for x, y in ((p.h, p.w), (p.g, p.u)))


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


# --- forward ----------------------------------------------------------------------------------------------------------


def check_statistics(p: Problem, states: Tensor) -> None:
    """Row values against eqs. (1) and (2). The same bits a second time."""
    values, _ = merge_states(p, states)
    assert torch.equal(values[:, : p.T], merge_states(p, states)[0][:, : p.T])
    m_z, m_r, lse_z, lse_r, lse_diff, kl, logp, ref_logp, ratio, *extras = values[:, : p.T].double().tolist()
    more, loss = 4 * math.sqrt(len(states)), p.loss
    for i, t in enumerate(p.true):
        y = int(p.labels[i])
        sums = more * EPS * (1 + math.log(p.V)) + loss
        if not loss:
            assert (m_z[i], m_r[i]) == (t.m_z, t.m_r)
        assert close(m_z[i], t.m_z, 0, loss) and close(m_r[i], t.m_r, 0, loss)
        assert close(lse_z[i], t.lse_z, EPS, sums) and close(lse_r[i], t.lse_r, EPS, sums), f"row {i}"
        lost = t.lost + loss
        bound = more * EPS * t.kl_scale + 2 * lost * math.sqrt(2 * t.kl) + lost**2
        assert close(kl[i], t.kl, 0, bound) and kl[i] >= 0, f"row {i}: {kl[i]}, wanted {t.kl} to {bound}"
        bound = more * EPS * t.diff_scale + 2 * lost
        assert close(lse_diff[i], t.lse_diff, 0, bound), f"row {i}: {lse_diff[i]}, wanted {t.lse_diff} to {bound}"
        away = abs(t.log_p[y]) + abs(t.log_q[y]) + t.lse_z + t.lse_r + abs(t.m_z - t.m_r)
        for found, want in ((logp, t.log_p[y]), (ref_logp, t.log_q[y]), (ratio, t.log_q[y] - t.log_p[y])):
            assert close(found[i], want, 0, bound + sums + 2 * EPS * away + loss), f"row {i}: {found[i]}, wanted {want}"
        check_extras(p, i, *(x[i] for x in extras))


def check_extras(p: Problem, i: int, entropy: float, total: float, is_argmax: float) -> None:
    t, z = p.true[i], p.logits[0][i]
    terms = [-math.exp(x) * x for x in t.log_p if x > -math.inf]
    size = math.fsum(math.exp(x) * (abs(x) + t.lse_z + 1) ** 2 for x in t.log_p if x > -math.inf)
    assert close(entropy, math.fsum(terms), 0, 4 * EPS * (size + math.log(p.V)) + p.loss * (2 + math.sqrt(size))), (
        f"row {i}"
    )
    assert close(total, float(z.sum()), 0, 4 * EPS * float(z.abs().sum()) + p.loss * p.V), f"row {i}"
    if not p.loss:
        assert bool(is_argmax) == (float(z[p.labels[i]]) == t.m_z)


@pytest.mark.parametrize("name", PROBLEMS)
def test_fused_stats(name):
    p = made(name)
    check_statistics(p, fused_stats(p))


@pytest.mark.parametrize("name", mainly(("loved",), ("plain", "loved", "ruled_out")))
def test_many_parts_merge_in_groups(name):
    """As if every column block were there 34 times: 3 parts become 102, in groups whose tops differ."""
    p, times = made(name), 34
    states = fused_stats(p)
    values = merge_states(p, states.repeat_interleave(times, 0))[0][:, : p.T].double()
    once = merge_states(p, states)[0][:, : p.T].double()
    more = math.log(times)
    for i in (2, 3, 9):  # lse_z, lse_r, entropy
        assert (values[i] - once[i] - more).abs().max() <= 32 * EPS * (more + once[i].abs().max())
    for i in (4, 5):  # lse_diff, kl
        assert (values[i] - once[i]).abs().max() <= 32 * EPS * (1 + once[i].abs().max())
    assert (values[10] - times * once[10]).abs().max() <= 32 * EPS * times * once[10].abs().max()


@pytest.mark.parametrize("name", ("plain", "fp16", "plain+one_head", "fp16+one_head"))
def test_fused_stats_from_descriptors_and_from_one_head(name):
    p = made(name)
    states = fused_stats(p)
    check_statistics(p, states)
    assert torch.equal(fused_stats(p, tma=True)[:, :KEPT], states[:, :KEPT])


@pytest.mark.parametrize("programs", mainly((2, 50), (1, 2, 5, 50)))
@pytest.mark.parametrize("name", mainly(("softcap",), ("plain", "softcap")))
def test_programs_that_take_turns_leave_the_same_bits(name, programs):
    """As many as there are tiles, fewer, or more; of all columns or from the middle of a tile on."""
    p, want = made(name), made_backward(name, "blocks")
    values = row_values(p)
    for cols in windows(p):
        one, other = (planes(p, cols[1] - cols[0], F16) for _ in range(2))
        states, again = fused_stats(p, one, cols), fused_stats(p, other, cols, programs=programs)
        assert torch.equal(states, again) and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
        dz, again = (fused_dz(p, values, want, cols, False, programs=n) for n in (None, programs))
        assert torch.equal(dz.nan_to_num(7.0), again.nan_to_num(7.0))


@pytest.mark.parametrize("name", ("plain", "near", "softcap"))
def test_staging_changes_no_statistic_to_the_bit(name):
    p = made(name)
    assert torch.equal(fused_stats(p, planes(p, p.V, F32))[:, :KEPT], fused_stats(p)[:, :KEPT])


@pytest.mark.parametrize("name", ("plain", "biased"))
@pytest.mark.parametrize("cuts", ((64,), (32, 64)), ids=str)
def test_windows_of_columns_merge(name, cuts):
    """Each launch has its own first and last column, on a tile's edge or not."""
    p = made(name)
    ends = [0, *(c for c in cuts if c < p.V), p.V]
    windows = list(zip(ends, ends[1:], strict=False))
    check_statistics(p, torch.cat([fused_stats(p, cols=w) for w in windows]))


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("cuts", ((), (32, 64)), ids=str)
def test_tile_stats(name, cuts):
    p = made(name)
    ends = [0, *(c for c in cuts if c < p.V), p.V]
    check_statistics(p, torch.cat([tile_stats(p, w) for w in zip(ends, ends[1:], strict=False)]))


@pytest.mark.parametrize("make", (lambda p, c: fused_stats(p, cols=c), tile_stats), ids=("fused", "rows"))
@pytest.mark.parametrize("cols", ((20, 84), (20, 70)))
def test_label_outside_a_window_adds_nothing(cols, make):
    p = replace(made("biased"), scale=1.0, ref_scale=1.0)
    states = make(p, cols)
    z, r = p.logits
    y = p.labels
    inside = (y >= cols[0]) & (y < cols[1])
    want = [torch.where(inside, x[torch.arange(p.T), y], 0.0) for x in (z, r)]
    assert inside.any() and not inside.all()
    assert torch.equal(states[:, 6:8].sum(0).double(), torch.stack(want))


@pytest.mark.parametrize("name", ("equal", "near_offset"))
def test_equal_models_have_no_kl(name):
    p = made(name)
    if name == "near_offset":
        p = replace(p, ref_bias=torch.full_like(p.ref_bias, 32.0))
    for states in (fused_stats(p), tile_stats(p)):
        values, _ = merge_states(p, states)
        assert not values[[4, 5, 8], : p.T].count_nonzero()
        assert torch.equal(values[6, : p.T], values[7, : p.T])


def check_planes(p: Problem, staged: Tensor, cols: tuple[int, int], width: int) -> None:
    """Of each tile: t its own log-ratio, p such that p e^-t is q, and the slope; nothing outside."""
    first, last = cols
    assert staged[..., last - first :].isnan().all() and not staged[..., : last - first].isnan().any()
    eps = torch.finfo(staged.dtype).eps / 2 + 8 * EPS
    for start in range(first, last, width):
        stop = min(start + width, last)
        for i, part in enumerate(p.truth(slice(start, stop)) if _some(p, start, stop) else []):
            at = slice(start - first, stop - first)
            weight, t = (x.double().tolist() for x in staged[:2, i, at])
            for v in range(stop - start):
                log_p, log_q = part.log_p[v], part.log_q[v]
                if log_p == -math.inf:
                    continue
                want, exact = max(log_p - log_q, -p.F), 16 * EPS * (4 + part.diff_scale + abs(log_p) + abs(log_q))
                exact += p.loss + part.rounding[v] + part.lost
                assert close(t[v], want, eps, exact), f"row {i}, column {start + v}: t {t[v]}, wanted {want}"
                if want > -p.F:
                    off = eps + exact * 4 + abs(t[v] - want)
                    assert close(
                        weight[v], math.exp(log_p), 2 * math.expm1(off), 1e-7 if staged.dtype == F16 else 1e-36
                    )
                if t[v] <= 0:
                    assert close(weight[v] * math.exp(-t[v]), math.exp(log_q), eps + 4 * exact, 1e-30 * math.exp(-t[v]))
    if p.softcap is not None:
        found = staged[2, :, : last - first].double()
        assert (found - p.slope[:, first:last]).abs().max() <= eps + 2 * p.loss / p.softcap


def _some(p: Problem, start: int, stop: int) -> bool:
    return all(bool((x[:, start:stop] > LOWEST / 10).any()) for x in p.logits)


STAGED = ("plain", "near", "ruled_out", "softcap", "hated", "loved")


@pytest.mark.parametrize("dtype", (F32, BF16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("name", STAGED)
def test_what_is_staged(name, dtype):
    p = made(name)
    cols = (20, 70) if p.V > 70 else (0, p.V)
    staged = planes(p, cols[1] - cols[0], dtype)
    fused_stats(p, staged, cols)
    check_planes(p, staged, cols, C)
    staged = planes(p, cols[1] - cols[0], dtype)
    tile_stats(p, cols, staged)
    check_planes(p, staged, cols, cols[1] - cols[0])


@pytest.mark.parametrize("name", STAGED)
def test_weights_of_staged_tiles(name):
    """p and q of a tile within the whole, q as its weight times e^-ratio; of the first `staged` parts."""
    p = made(name)
    states = fused_stats(p, planes(p, p.V, F32))
    _, weights = merge_states(p, states, 2)
    for k in range(2):
        if not _some(p, k * C, min((k + 1) * C, p.V)):
            continue
        for i, part in enumerate(p.truth(slice(k * C, (k + 1) * C))):
            t, (weight, ref_weight, ratio) = p.true[i], weights[k, :, i].double().tolist()
            log_p, log_q = part.m_z + part.lse_z - t.m_z - t.lse_z, part.m_r + part.lse_r - t.m_r - t.lse_r
            off = 16 * EPS * (4 + t.diff_scale + part.diff_scale + abs(log_p) + abs(log_q)) + 2 * p.loss
            assert close(weight, math.exp(log_p), off, 1e-36), f"tile {k}, row {i}: {weight}"
            assert close(ref_weight * math.exp(-ratio), math.exp(log_q), off, 1e-36), f"tile {k}, row {i}: {ref_weight}"


@pytest.mark.parametrize("build", ("fused", "tile"))
@pytest.mark.parametrize("name", ("plain", "near"))
def test_what_sixteen_bits_took_from_a_row_is_made_up_for(name, build):
    """In each tile, but for the label's entry, which backward has in full: the sum of p, and by how much that of q is
    another."""
    p, make, width = made(name), fused_stats, C
    if build == "tile":
        make, width = tile_stats, p.V
    staged = planes(p, p.V, BF16)
    states = make(p, staged=staged)
    _, weights = merge_states(p, states, len(states))
    true_p, true_q = (torch.tensor([getattr(t, x) for t in p.true], dtype=F64).exp() for x in ("log_p", "log_q"))
    others = torch.arange(p.V) != p.labels[:, None]
    for k, start in enumerate(range(0, p.V, width)):
        cols = slice(start, min(start + width, p.V))
        weight, ref_weight, ratio = weights[k, :, : p.T, None].double()
        kept, t = staged[:2, :, cols].double()
        found_p, found_q = weight * kept, ref_weight * kept * torch.exp(-t - ratio)
        pairs = (found_p, true_p[:, cols]), (found_q - found_p, (true_q - true_p)[:, cols])
        for found, true in pairs:
            off = ((found - true) * others[:, cols]).sum(1).abs() / ((true_p + true_q) * others)[:, cols].sum(1)
            assert off.max() <= 32 * EPS, f"tile {k}: {off.max()}"


# --- backward ---------------------------------------------------------------------------------------------------------


COTANGENTS = ("general", "kl_zero", "equal", "logp_zero", "blocks", "mixed", "zero")


@dataclass(frozen=True)
class Backward:
    """Coefficients ``(3, stride)``, the truth, and how far off an entry may be."""

    coefficients: Tensor
    true: Tensor
    bound: Tensor


def backward(p: Problem, what: str) -> Backward:
    """g_logp and g_kl of the kind, or by turns: in blocks of R rows, or row by row."""
    g_logp, g_kl = torch.randn(2, p.T, generator=torch.Generator().manual_seed(4)).double()
    n = torch.arange(p.T)
    kind = {"blocks": n // R, "mixed": n % 4}.get(
        what, torch.full_like(n, COTANGENTS.index(what) if what != "zero" else 4)
    )
    none = (kind == 4) | (torch.tensor(what == "blocks") & (kind == 0))
    g_kl = torch.where(kind == 1, 0.0, torch.where(kind == 2, g_logp, g_kl))
    g_logp = torch.where(kind == 3, 0.0, g_logp)
    g_logp, g_kl = torch.where(none, 0.0, g_logp), torch.where(none, 0.0, g_kl)
    stride = p.T + 3
    coefficients, true, bound = poisoned(3, stride), [], []
    for i, t in enumerate(p.true):
        a, b, y = -float(g_kl[i]) * p.scale, -float(g_logp[i]) * p.scale, int(p.labels[i])
        a, b = torch.tensor([a, b]).tolist()
        z, r = (oracle_row(x[i]) for x in p.logits)
        values = oracle.dz(z, r, y, -b, -a)
        coefficients[:, i] = torch.tensor([a, b, values[y]])
        true.append(values)
        bound.append([entry_bound(p, t, z, r, v, a, b) for v in range(p.V)])
    true, bound = torch.tensor(true, dtype=F64) * p.slope, torch.tensor(bound, dtype=F64)
    return Backward(coefficients, true, bound + true.abs() * EPS + p.loss * (true / p.slope).abs())


def oracle_row(x: Tensor) -> list[float]:
    return [-math.inf if v < LOWEST / 10 else v for v in x.tolist()]


def entry_bound(p: Problem, t: Row, z: list[float], r: list[float], v: int, a: float, b: float) -> float:
    """eps times the size of what p and q are exponentials of; where they agree only of their ratio."""
    if t.log_p[v] == -math.inf:
        return 0.0
    size = EPS * (4 + abs(z[v] - t.m_z) + abs(r[v] - t.m_r) + t.lse_z + t.lse_r) + p.loss
    x, y = math.exp(t.log_p[v]), math.exp(t.log_q[v])
    ratio = abs(t.log_q[v] - t.log_p[v])
    apart = ratio + abs(t.lse_diff) if ratio < 0.3 else 1.0
    lost = x * (t.rounding[v] + t.lost) if ratio < 1 else 0.0
    off = 8 * EPS * (t.kl + math.fsum(q * abs(q2 - p2) for q, q2, p2 in _apart(t)))
    return (
        2 * size * (abs(b) * x + abs(a) * apart * (x + y))
        + abs(a) * (lost + x * (off + p.loss))
        + 1e-37 * (abs(a) + abs(b))
    )


def _apart(t: Row) -> list[tuple[float, float, float]]:
    return [(math.exp(q), q, p) for p, q in zip(t.log_p, t.log_q, strict=True) if min(p, q) > -math.inf]


_backwards: dict[tuple[str, str], Backward] = {}


def made_backward(name: str, what: str) -> Backward:
    if (name, what) not in _backwards:
        _backwards[name, what] = backward(made(name), what)
    return _backwards[name, what]


def check_dz(found: Tensor, want: Backward, cols: tuple[int, int], more: float = 1.0, eps: float = 0.0) -> None:
    """Every entry, and nothing else written."""
    width = cols[1] - cols[0]
    assert found[:, width:].isnan().all()
    true, bound = want.true[:, slice(*cols)], want.bound[:, slice(*cols)]
    error = (found[:, :width].double() - true).abs()
    bad = ~(error <= more * bound + eps * true.abs())
    i, v = (bad * error.nan_to_num(math.inf)).flatten().argmax().item() // width, 0
    if bad.any():
        i, v = bad.nonzero()[0].tolist()
    assert not bad.any(), (
        f"{int(bad.sum())} of {bad.numel()}; ({i}, {v}): {found[i, v]}, wanted {true[i, v]} to {more * bound[i, v]:.3g}"
    )


def check_row_sums(found: Tensor, want: Backward, more: float = 1.0) -> None:
    assert (found.double().sum(1).abs() <= more * want.bound.sum(1) + EPS * want.true.abs().sum(1)).all()


def row_values(p: Problem) -> Tensor:
    return merge_states(p, tile_stats(p))[0]


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


def windows(p: Problem) -> list[tuple[int, int]]:
    return [(0, p.V), *([(20, 70)] if p.V > 70 else [])]


DZ = [(name, "general") for name in PROBLEMS]
DZ += [(name, what) for name in ("plain", "softcap") for what in COTANGENTS if what != "general"]


@pytest.mark.parametrize(("name", "what"), DZ)
def test_fused_dz(name, what):
    p, want = made(name), made_backward(name, what)
    values = row_values(p)
    found = fused_dz(p, values, want, (0, p.V), tma=False)
    check_dz(found, want, (0, p.V))
    if p.softcap is None:
        check_row_sums(found[:, : p.V], want)
    if name == "biased":
        check_dz(fused_dz(p, values, want, (20, 70), tma=False), want, (20, 70))


@pytest.mark.parametrize("name", ("fp16", "softcap"))
def test_fused_dz_from_descriptors_is_the_same_to_the_bit(name):
    p, want = made(name), made_backward(name, "blocks")
    values = row_values(p)
    one, other = (fused_dz(p, values, want, (0, p.V), tma)[:, : p.V] for tma in (False, True))
    assert torch.equal(one, other)


def test_fused_dz_in_sixteen_bits_is_the_same_rounded():
    p, want = made("fp16"), made_backward("fp16", "general")
    values = row_values(p)
    full, half = (fused_dz(p, values, want, (0, p.V), False, dtype)[:, : p.V] for dtype in (F32, F16))
    assert torch.equal(full.to(F16), half)


@pytest.mark.parametrize(("name", "what"), DZ)
def test_tile_dz(name, what):
    """From the tiles that are needed only."""
    p, want = made(name), made_backward(name, what)
    values = row_values(p)
    needs_z, needs_r = what != "equal" or p.softcap is not None, what not in ("kl_zero", "zero")
    for cols in windows(p):
        check_dz(tile_dz(p, values, want, cols, needs_z, needs_r), want, cols)


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


@pytest.mark.parametrize("name", STAGED)
def test_staged_dz(name):
    """In fp32: to the rounding of t, which is a few nats, or hundreds."""
    p, want = made(name), made_backward(name, "general")
    for cols in windows(p):
        found = staged_dz(p, want, cols, F32)
        more = 1 + 4 * max(t.kl + abs(t.m_z - t.m_r) for t in p.true)
        check_dz(found, want, cols, 4 + more, 8 * EPS)


@pytest.mark.parametrize("name", ("plain", "near_offset", "softcap"))
def test_staged_dz_from_bf16_is_within_three_per_mille(name):
    p, want = made(name), made_backward(name, "logp_zero")
    found = staged_dz(p, want, (0, p.V), BF16)[:, : p.V].double()
    assert (found - want.true).norm() <= 3e-3 * want.true.norm()


@pytest.mark.parametrize("name", ("near", "near_offset"))
def test_kl_gradient_keeps_its_digits_where_the_models_nearly_agree(name):
    p, want = made(name), made_backward(name, "logp_zero")
    values = row_values(p)
    pair = [fused_dz(p, values, want, (0, p.V), False), tile_dz(p, values, want, (0, p.V), True, True)]
    for found in (*pair, staged_dz(p, want, (0, p.V), F32)):
        error = (found[:, : p.V].double() - want.true).norm(dim=1)
        assert (error <= 16 * EPS * want.true.norm(dim=1)).all()


def test_equal_models_have_no_kl_gradient():
    p, want = made("equal"), made_backward("equal", "logp_zero")
    values = row_values(p)
    assert not want.true.count_nonzero()
    for found in (
        fused_dz(p, values, want, (0, p.V), False), tile_dz(p, values, want, (0, p.V), True, True),
        staged_dz(p, want, (0, p.V), BF16),
    ):  # fmt: skip
        assert not found[:, : p.V].count_nonzero()


# --- more than 2^31 elements ------------------------------------------------------------------------------------------


MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # `mmap` has its name since Python 3.13


def far_apart(x: Tensor, _: int = 0) -> Tensor:
    """x, its last row 2^31 elements or more behind its first, in memory that is not there until it is touched, nor
    asked for: a small machine would not promise as much."""
    rows, cols = x.shape[-2:]
    stride = (2**31 // max(rows - 1, 1) // 16 + 1) * 16
    size = (rows - 1) * stride + x.shape[:-2].numel() * cols
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    room = torch.frombuffer(mmap.mmap(-1, size * x.itemsize, flags), dtype=x.dtype)
    return room.as_strided(x.shape, (*[cols] * (x.dim() - 2), stride, 1)).copy_(x)


def test_matrices_of_more_than_two_to_the_31_elements(monkeypatch):
    """Whatever is loaded, staged or written, by row: an offset in 32 bits would wrap around."""
    p, want, cols = made("softcap"), made_backward("softcap", "general"), (20, 70)
    values = row_values(p)

    def everything() -> list[Tensor]:
        staged = [planes(p, cols[1] - cols[0], F32) for _ in range(2)]
        states = fused_stats(p, staged[0], cols), tile_stats(p, cols, staged[1])
        dz = fused_dz(p, values, want, cols, False), tile_dz(p, values, want, cols, True, True)
        return [*states, *staged, *dz, staged_dz(p, want, cols, F32)]

    near, build_planes, build_dz = everything(), planes, dz_of
    monkeypatch.setitem(globals(), "strided", far_apart)
    monkeypatch.setitem(globals(), "planes", lambda *args: far_apart(build_planes(*args)))
    monkeypatch.setitem(globals(), "dz_of", lambda *args: far_apart(build_dz(*args)))
    far = everything()
    assert all(torch.equal(x.nan_to_num(9.0), y.nan_to_num(9.0)) for x, y in zip(near, far, strict=True))
    assert all(x.stride(-2) * (p.T - 1) >= 2**31 for x in far[2:])
