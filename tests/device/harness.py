"""Launches under Triton's interpreter with every address checked, rows to launch on, and the truth about them.

Importing this skips the importing module unless ``TRITON_INTERPRET=1`` was set when the process began.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip(
        "device code is interpreted in a process of its own: TRITON_INTERPRET=1 python -m pytest tests/device",
        allow_module_level=True,
    )

from triton.runtime import interpreter  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from tdpo_kernels.backends.tile_math import LOWEST  # noqa: E402

F16, F32, F64 = torch.float16, torch.float32, torch.float64
EPS = torch.finfo(F32).eps
NAN = float("nan")


# --- launches ---------------------------------------------------------------------------------------------------------


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **more: Any) -> None:
    """`kernel` on `grid`; an AssertionError if it touches memory that is not its arguments'. What exp() overflows to
    in the branch that a tl.where does not take is no news, nor is what is computed from that."""
    tensors = [x.base if isinstance(x, TensorDescriptor) else x for x in (*args, *more.values())]
    with _bounds([x for x in tensors if isinstance(x, Tensor)]), np.errstate(over="ignore", invalid="ignore"):
        kernel[grid](*args, **more)


@contextmanager
def _bounds(tensors: list[Tensor]) -> Iterator[None]:
    spans = np.array([_span(x) for x in tensors], dtype=np.uint64)
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    faults: list[str] = []

    def check(what: str, ptrs: Any, mask: Any) -> None:
        at = np.atleast_1d(ptrs.data)[np.broadcast_to(np.atleast_1d(mask.data), np.shape(np.atleast_1d(ptrs.data)))]
        inside = ((at[:, None] >= spans[:, 0]) & (at[:, None] < spans[:, 1])).any(1)
        if not inside.all():
            faults.append(f"{what} of {int((~inside).sum())} elements outside every argument")
            raise AssertionError(faults[-1])

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        check("load", ptrs, mask)
        return load(self, ptrs, mask, *rest, **more)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **more: Any) -> Any:
        check("store", ptrs, mask)
        return store(self, ptrs, value, mask, *rest, **more)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def _span(x: Tensor) -> tuple[int, int]:
    """First and last address of what a view covers."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def poisoned(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    """An output: what a kernel leaves alone stays NaN."""
    return torch.full(shape, NAN, dtype=dtype)


def strided(x: Tensor, spare: int = 8) -> Tensor:
    """x with `spare` more columns of NaN between its rows."""
    out = torch.full((x.shape[0], x.shape[1] + spare), NAN, dtype=x.dtype)
    out[:, : x.shape[1]] = x
    return out[:, : x.shape[1]]


def power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def padded(x: Tensor, fill: float) -> Tensor:
    """``(R, C)`` or ``(R,)`` up to powers of 2."""
    out = torch.full([power_of_2(n) for n in x.shape], fill, dtype=x.dtype)
    out[tuple(slice(n) for n in x.shape)] = x
    return out


# --- rows -------------------------------------------------------------------------------------------------------------

KINDS = ("flat", "peaked", "near", "equal", "offset", "negative_offset", "hated", "loved", "ruled_out", "reference_out")


def rows(kind: str, V: int = 24, R: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z, noise = (torch.randn(R, V, generator=g, dtype=F64) for _ in range(2))
    z *= 12.0 if kind == "peaked" else 1.0
    r = z + noise * {"peaked": 4.0, "near": 1e-3, "equal": 0.0}.get(kind, 0.5)
    if kind == "offset":
        r += 50
    elif kind == "negative_offset":
        r -= 50
    elif kind == "hated":
        z[:, V // 2] -= 104
    elif kind == "loved":
        z[:, V // 2] += 45
    elif kind == "ruled_out":
        z[:, ::5], r[:, ::5] = LOWEST, LOWEST
    elif kind == "reference_out":
        r[:, ::5] = LOWEST
    return z.float(), r.float()


def every_kind(V: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two rows of each, so that one launch does them all."""
    pairs = [rows(kind, V, 2, seed) for kind in KINDS]
    return torch.cat([z for z, _ in pairs]), torch.cat([r for _, r in pairs])


def on_grid(x: Tensor, step: float) -> Tensor:
    return (x / step).round() * step


def exact_rows(apart: float, offset: float, V: int = 24, R: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of size 1 on so coarse a grid that z - r, offset and all, is exact: nothing is lost before the sums."""
    g = torch.Generator().manual_seed(seed)
    step = 2.0**-16
    r, noise = (on_grid(s * torch.randn(R, V, generator=g, dtype=F64), step) for s in (1.0, apart))
    z = r + noise + offset
    assert torch.equal(z.float().double(), z) and torch.equal((z.float() - r.float()).double(), z - r)
    return z.float(), r.float()


def floats(x: Tensor) -> list[float]:
    return [-math.inf if v < LOWEST / 10 else v for v in x.double().tolist()]


class Row(NamedTuple):
    """The truth about one row; log-sum-exps relative to the tops, as a state keeps them, and what rounding may do.

    `rounding`: what z - r and m_z - m_r lose, together, when they are rounded to fp32; `lost`: the mean of that under
    q. `kl_scale` and `diff_scale`: times eps, what kl and lse_diff amount to when every anchored logit moves by an eps
    of its size.
    """

    m_z: float
    m_r: float
    lse_z: float
    lse_r: float
    lse_diff: float
    kl: float
    log_p: list[float]
    log_q: list[float]
    rounding: list[float]
    lost: float
    kl_scale: float
    diff_scale: float


def row(z_C: Tensor, r_C: Tensor) -> Row:
    z, r = floats(z_C), floats(r_C)
    m_z, m_r = max(z), max(r)
    lse_z, lse_r = (oracle.logsumexp([v - top for v in x]) for x, top in ((z, m_z), (r, m_r)))
    log_p, log_q, kl = oracle.log_softmax(z), oracle.log_softmax(r), oracle.kl(z, r)
    both = [v for v in range(len(z)) if z[v] > -math.inf and r[v] > -math.inf]
    p, q = [math.exp(x) for x in log_p], [math.exp(x) for x in log_q]
    size_z = [abs(x - m_z) if x > -math.inf else 0.0 for x in z]
    size_r = [abs(x - m_r) if x > -math.inf else 0.0 for x in r]
    rounding = [_rounding(z[v], r[v]) + _rounding(m_z, m_r) if v in both else 0.0 for v in range(len(z))]
    lost = math.fsum(x * y for x, y in zip(q, rounding, strict=True))
    moved = math.fsum(abs(p[v] - q[v]) * (1 + size_z[v]) for v in range(len(z)))
    tilted = math.fsum(q[v] * abs(log_q[v] - log_p[v] - kl) * (1 + size_r[v]) for v in both)
    apart = math.fsum(q[v] * (size_z[v] + size_r[v]) for v in both)
    return Row(
        m_z, m_r, lse_z, lse_r, lse_z - lse_r, kl, log_p, log_q, rounding, lost,
        kl_scale=kl + moved + tilted, diff_scale=apart + kl + abs(lse_z - lse_r),
    )  # fmt: skip


def _rounding(x: float, y: float) -> float:
    return abs(float(np.float32(x) - np.float32(y)) - (x - y))


def close(found: Any, want: float, relative: float = 0.0, absolute: float = 0.0) -> bool:
    """An error within a relative and an absolute part of it. False for NaN."""
    return abs(float(found) - want) <= relative * abs(want) + absolute


def check_all(found: Sequence[Any] | Tensor, want: Sequence[float], bound: Callable[[int], float]) -> None:
    """Every entry within its own bound; names the worst one."""
    values = found.double().tolist() if isinstance(found, Tensor) else [float(x) for x in found]
    worst = max(range(len(want)), key=lambda v: _excess(values[v], want[v], bound(v)))
    assert _excess(values[worst], want[worst], bound(worst)) <= 1, (
        f"entry {worst}: {values[worst]!r}, wanted {want[worst]!r} to {bound(worst):.3g}"
    )


def _excess(found: float, want: float, bound: float) -> float:
    error = abs(found - want)
    return math.inf if math.isnan(error) else 0.0 if error == 0 else error / bound if bound else math.inf
