"""A kernel configuration checks itself the first time a process uses it, on the launch at hand.

64 rows, tile edges among them, are recomputed in plain torch in float64 over the whole vocabulary, in chunks of it.
Forward: their statistics. Backward: their dz, eq. (6), in 64 columns of each slab, labels and tile edges among them.
A disagreement raises: nothing is trained on what a miscompiled kernel made.

What is allowed is derived, not picked. A product may be 4 times as far off, relative to ``|h| |w|``, as the device's
own library product of the same operands is at worst in these rows; each later step rounds. Those errors of the logits
are carried to first order into each number that is compared, and the result doubled.

``TDPO_KERNELS_SELF_CHECK=0`` in the environment turns it off. A configuration that passed costs a look into a set: no
launch, no synchronisation. Nothing is checked, nor counts as checked, while a CUDA graph is captured (warm up first).
Inputs that are not finite are warned of, once, and the check put off.

Under a process group all ranks raise together (`_Peers`).
"""

from __future__ import annotations

import math
import os
import platform
import random
import re
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..types import Forward, Inputs, Model
from ..version import __version__
from .launch import Launch, tf32_is_allowed
from .products import SIXTEEN_BIT, forward_operand_dtype, logits_
from .slab import Grid
from .tile_math import is_lowest

SWITCH = "TDPO_KERNELS_SELF_CHECK"
ROWS = COLUMNS = 64
CHUNK = 2**23  # float64 numbers of a chunk of weights, 64 MiB; an eighth of that on a CPU
MARGIN = 2.0
EPS = torch.finfo(torch.float32).eps
TINY = 1e-36  # what flushing subnormals may lose, of a probability
STAGED = 2.0**-8  # p, t and the slope are rounded to bf16, and rows' sums made up for it: twice 2^-9
FAR = 30.0  # log-ratios beyond are staged as if they were no larger (`tile_math.largest_exponent`)
LARGEST = 1e29  # logits beyond are no numbers to the kernels (`tile_math.LOWEST`)


Key = tuple[Launch, int, int]  # and both hidden sizes, on which the configuration depends that staged what is read back

_passed: set[Key] = set()  # sets are thread-safe; two threads at once may both check
_warned: set[str] = set()


def forget() -> None:
    """As in a fresh process."""
    _passed.clear()
    _warned.clear()


def enabled() -> bool:
    """The switch, looked at on every call that has something to check."""
    return os.environ.get(SWITCH, "1") != "0"


def forward(inputs: Inputs, grid: Grid, launches: Iterable[Launch], out: Forward) -> None:
    """Compares the statistics in `out` of all launches together; RuntimeError if they are wrong."""
    fresh = _fresh(inputs, launches)
    if not fresh or not _may_check(inputs):
        return

    @torch.no_grad()
    def compare() -> Finding:
        rows = _sample(grid.T, grid.R, fresh[0].config.R, ROWS)
        truth = _Rows(inputs, torch.tensor(rows, device=out.logp_T.device))
        wanted = truth.statistics()
        found = {"logp": out.logp_T, "ref_logp": out.ref_logp_T, "kl": out.kl_T}
        finding = Finding(truth.odd)
        for name, (want_R, allowed_R) in wanted.items():
            finding.add(name, found[name][truth.at].double()[:, None], want_R[:, None], allowed_R[:, None], rows, None)
        return finding

    _judge(inputs, fresh, compare)


class Slabs:
    """The same for backward, which makes dz slab by slab: `see` each as it was made, `verdict` in the end.

    Args:
        scale: of dz as the kernels write it.
    """

    def __init__(
        self, inputs: Inputs, grid: Grid, g_logp_T: Tensor | None, g_kl_T: Tensor | None, scale: float
    ) -> None:
        self.inputs, self.grid, self.g_logp_T, self.g_kl_T, self.scale = inputs, grid, g_logp_T, g_kl_T, scale
        self.samples: dict[Launch, _Slab] = {}
        self.off = False

    def see(self, launch: Launch, rows: slice, cols: slice, dz: Tensor) -> None:
        """dz ``(R, C)`` of these rows and columns, not yet used for anything else."""
        if self.off or not _fresh(self.inputs, [launch]):
            return
        if not self.samples and not _may_check(self.inputs):
            self.off = True
            return
        if launch not in self.samples:
            self.samples[launch] = _Slab(self.inputs, self.grid, launch)
        self.samples[launch].take(rows, cols, dz)

    def verdict(self) -> None:
        """RuntimeError if anything seen was wrong."""
        for launch, sample in self.samples.items():
            _judge(self.inputs, [launch], lambda sample=sample: sample.compare(self.g_logp_T, self.g_kl_T, self.scale))


def _fresh(inputs: Inputs, launches: Iterable[Launch]) -> list[Launch]:
    return [launch for launch in launches if _key(inputs, launch) not in _passed]


def _key(inputs: Inputs, launch: Launch) -> Key:
    return launch, inputs.policy.hidden.shape[1], inputs.reference.hidden.shape[1]


def _may_check(inputs: Inputs) -> bool:
    if not enabled():
        return False
    device = inputs.policy.hidden.device
    if device.type != "cuda":
        return True
    with torch.cuda.device(device):
        return not torch.cuda.is_current_stream_capturing()


def _judge(inputs: Inputs, launches: list[Launch], compare: Callable[[], Finding]) -> None:
    """Compares, agrees with the peers, and marks the launches as passed, warns, or raises."""
    peers, fault = _Peers.enter(), ""
    finding: Finding | None = None
    try:
        finding = compare()
        fault = finding.fault and _report(inputs, launches, finding)
    finally:
        theirs = peers.leave(fault)
    if fault:
        raise RuntimeError(fault)
    if finding.odd:
        _warn(launches, finding.odd)
    else:
        _passed.update(_key(inputs, launch) for launch in launches)
    if theirs:
        raise RuntimeError(f"another process found its kernels to be wrong; this one stops with it. There:\n{theirs}")


def _warn(launches: list[Launch], odd: list[str]) -> None:
    if not _warned:
        _warned.add("odd")
        warnings.warn(
            f"tdpo_kernels: the self-check of {launches[0].kernel} is put off: {'; '.join(odd)}",
            RuntimeWarning,
            stacklevel=4,
        )


# --- what is sampled --------------------------------------------------------------------------------------------------


def _sample(length: int, block: int, tile: int, count: int, wanted: Iterable[int] = ()) -> list[int]:
    """Up to `count` indices below `length`, sorted: both ends, `wanted`, both sides of edges of tiles, which begin
    anew in every block, and others, always the same ones."""
    choice = random.Random(length)
    if length <= count:
        return list(range(length))
    starts = choice.sample(range(0, length, block), min(count, -(-length // block)))
    edges = {0, length - 1, (length - 1) // block * block}
    edges.add(max(edges) - (max(edges) - (length - 1) // block * block) % tile)  # of the last, partial tile
    picked = edges | {i - 1 for i in edges if i > 0}
    for start in starts:
        edge = start + tile * choice.randrange(-(-min(block, length - start) // tile))
        picked |= {edge, max(edge - 1, 0)} if len(picked) < count // 2 else set()
    for i in wanted:
        picked |= {i} if len(picked) < 3 * count // 4 else set()
    while len(picked) < count:
        picked.add(choice.randrange(length))
    return sorted(picked)


class _Slab:
    """Rows of one launch's dz and, in every slab of it that goes by, columns."""

    def __init__(self, inputs: Inputs, grid: Grid, launch: Launch) -> None:
        self.inputs, self.grid, self.launch = inputs, grid, launch
        self.rows = _sample(grid.T, grid.R, launch.config.R, ROWS)
        self.device = inputs.policy.hidden.device
        self.at = torch.tensor(self.rows, device=self.device)
        self.labels = inputs.rows.labels_T[self.at].tolist()
        self.columns: dict[int, list[int]] = {}
        self.taken: list[tuple[list[int], int, Tensor, torch.dtype]] = []

    def take(self, rows: slice, cols: slice, dz: Tensor) -> None:
        mine = [n for n, row in enumerate(self.rows) if rows.start <= row < rows.stop]
        if not mine:
            return
        if cols.start not in self.columns:
            labels = [y - cols.start for y in self.labels if cols.start <= y < cols.stop]
            length = cols.stop - cols.start
            self.columns[cols.start] = _sample(length, length, max(self.launch.config.C, 1), COLUMNS, labels)
        within = torch.tensor([self.rows[n] - rows.start for n in mine], device=self.device)
        columns = torch.tensor(self.columns[cols.start], device=self.device)
        self.taken.append((mine, cols.start, dz[within][:, columns].double(), dz.dtype))

    @torch.no_grad()
    def compare(self, g_logp_T: Tensor | None, g_kl_T: Tensor | None, scale: float) -> Finding:
        truth = _Rows(self.inputs, self.at)
        truth.statistics()
        zero = torch.zeros(len(self.rows), dtype=torch.float64, device=self.device)
        g_logp, g_kl = (zero if g is None else g[self.at].double() for g in (g_logp_T, g_kl_T))
        truth.expect("the gradients that came in", torch.isfinite(g_logp + g_kl).all())
        finding = Finding(truth.odd)
        staged = self.launch.kernel == "staged_dz"
        for mine, first, found, dtype in self.taken:
            columns = [first + c for c in self.columns[first]]
            part = truth.only(torch.tensor(mine, device=self.device))
            want, allowed = part.dz(torch.tensor(columns, device=self.device), g_logp[mine], g_kl[mine], staged)
            info = torch.finfo(dtype)
            allowed = allowed * scale + info.eps * want.abs() * scale + info.smallest_normal * info.eps
            finding.add("dz", found, want * scale, allowed, [self.rows[n] for n in mine], columns)
        return finding


# --- what is right ----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Side:
    """One model's sampled rows: its logits in float64, and how far from them a kernel's may be.

    unit: the worst error of the library's product of the same operands, in units of ``|h| |w|``.
    """

    model: Model
    hidden: Tensor  # (R, D), rounded to the dtype of the products
    unit: Tensor

    @staticmethod
    def of(model: Model, at: Tensor) -> _Side:
        hidden = model.hidden.detach()[at].to(model.dtype)
        return _Side(model, hidden, torch.zeros((), dtype=torch.float64, device=hidden.device))

    def measure(self, cols: slice) -> None:
        """`unit` is the largest of all that is measured."""
        weight = self.model.head.weight.detach()[cols].to(self.model.dtype)
        dtype = forward_operand_dtype(self.model.dtype, torch.float32, weight.device)
        plain = torch.empty(len(self.hidden), len(weight), dtype=torch.float32, device=weight.device)
        logits_(plain, self.hidden.to(dtype), weight.to(dtype))
        h, w = self.hidden.double(), weight.double()
        off = (plain.double() - h @ w.T).abs_() / _norms(h, w).clamp_(min=1e-300)
        self.unit = torch.maximum(self.unit, off.nan_to_num(0.0, 0.0).amax())

    def logits(self, cols: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Both ``(R, C)``. -inf where a bias rules out, for certain."""
        head, D = self.model.head, self.hidden.shape[1]
        h, w = self.hidden.double(), head.weight.detach()[cols].to(self.model.dtype).double()
        x = h @ w.T
        tf32 = self.model.dtype == torch.float32 and tf32_is_allowed()
        rounded = 2.0**-10 if tf32 and x.is_cuda else EPS / 4  # operands; otherwise what a sum of 16 loses
        off = _norms(h, w) * (4 * self.unit + 8 * rounded / D**0.5) + (2 * rounded + 2 * EPS) * x.abs()
        if head.bias is not None:
            x = x + head.bias.detach()[cols].to(self.model.dtype).double()
            off = off + 2 * EPS * x.abs()
        x, off = x * head.logit_scale, off * abs(head.logit_scale)
        z = x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)
        off = off + 4 * EPS * (z.abs() + x.abs().clamp(max=z.abs().amax()))
        out = is_lowest(z)
        return z.masked_fill(out, -torch.inf), off.masked_fill(out, 0.0)

    def slope(self, z: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
        """d logits / d (h W^T + b)."""
        head = self.model.head
        if head.softcap is None:
            return torch.full_like(z, head.logit_scale), torch.zeros_like(z)
        u = z / head.softcap
        return (1 - u * u) * head.logit_scale, (2 * u.abs() * off / head.softcap + 4 * EPS) * abs(head.logit_scale)


def _norms(h: Tensor, w: Tensor) -> Tensor:
    """``(R, C)`` of ``|h| |w|``."""
    return torch.linalg.vector_norm(h, dim=1)[:, None] * torch.linalg.vector_norm(w, dim=1)


@dataclass(eq=False)
class _Rows:
    """The truth about sampled rows, from the inputs alone. `odd`: what there is not to be judged by."""

    inputs: Inputs
    at: Tensor  # (R,) of the T rows
    odd: list[tuple[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows = self.inputs.rows
        hidden = self.at if rows.hidden_T is None else rows.hidden_T[self.at]
        self.labels = rows.labels_T[self.at]
        self.z, self.r = _Side.of(self.inputs.policy, hidden), _Side.of(self.inputs.reference, hidden)

    def only(self, n: Tensor) -> _Rows:
        """Some of them, statistics included."""
        part = object.__new__(_Rows)
        part.inputs, part.odd, part.at, part.labels = self.inputs, self.odd, self.at[n], self.labels[n]
        part.z, part.r = replace(self.z, hidden=self.z.hidden[n]), replace(self.r, hidden=self.r.hidden[n])
        part.lse_z, part.lse_r, part.off_z, part.off_r, part.apart = (
            x[n] for x in (self.lse_z, self.lse_r, self.off_z, self.off_r, self.apart)
        )
        return part

    def expect(self, what: str, finite: Tensor) -> None:
        self.odd.append((what, ~finite))

    def statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """logp, ref_logp and kl, eqs. (1) and (2), each with what it may be off; two passes over the vocabulary."""
        chunks = self._chunks()
        for name, side in (("hidden", self.z), ("ref_hidden", self.r)):
            self.expect(name, torch.isfinite(side.hidden).all())
        self._check_heads(chunks)
        lse: list[Tensor] = []
        for side in (self.z, self.r):
            tops = []
            for cols in chunks:
                side.measure(cols)
                logits = side.logits(cols)[0]
                self.expect("logits, as large as they are,", ~(logits.masked_fill(logits == -torch.inf, 0).abs() > LARGEST).any())  # fmt: skip # noqa: E501
                tops.append(logits.logsumexp(1))
            lse.append(torch.stack(tops).logsumexp(0))
        self.lse_z, self.lse_r = lse
        sums = [self._sums(cols) for cols in chunks]
        *added, apart = zip(*sums, strict=True)
        kl, self.off_z, self.off_r, off_kl, second = (torch.stack(x).sum(0) for x in added)
        self.apart = torch.stack(apart).amax(0)
        (logp, off), (ref_logp, ref_off) = self._at_labels(self.z, self.lse_z), self._at_labels(self.r, self.lse_r)
        off_kl = off_kl + kl.clamp(max=1e30) * self.off_r + second + 32 * EPS * kl
        out = {
            "logp": (logp, MARGIN * (off + self.off_z + 16 * EPS * (1 + logp.abs()))),
            "ref_logp": (ref_logp, MARGIN * (ref_off + self.off_r + 16 * EPS * (1 + ref_logp.abs()))),
            "kl": (kl, MARGIN * off_kl + TINY),
        }
        for name, (want, _) in out.items():
            self.expect(f"{name}, in float64 too,", ~want.isnan().any())
        return out

    def _chunks(self) -> list[slice]:
        V, width = self.inputs.policy.head.weight.shape[0], max(self.z.hidden.shape[1], self.r.hidden.shape[1], ROWS)
        step = max((CHUNK if self.at.is_cuda else CHUNK // 8) // width, COLUMNS)
        return [slice(a, min(a + step, V)) for a in range(0, V, step)]

    def _check_heads(self, chunks: list[slice]) -> None:
        for name, side in (("head", self.z), ("ref_head", self.r)):
            head, dtype = side.model.head, side.model.dtype
            for cols in chunks:
                self.expect(f"{name}.weight", torch.isfinite(head.weight.detach()[cols].to(dtype)).all())
            if head.bias is not None:
                self.expect(f"{name}.bias", (head.bias.detach().to(dtype) < torch.inf).all())

    def _pair(self, cols: slice | Tensor) -> tuple[Tensor, ...]:
        """log p, log q and how far off each logit may be, in all; delta' = log q - log p, 0 where both rule out."""
        (z, off_z), (r, off_r) = self.z.logits(cols), self.r.logits(cols)
        log_p, log_q = z - self.lse_z[:, None], r - self.lse_r[:, None]
        neither = (z == -torch.inf) & (r == -torch.inf)
        return log_p, log_q, (log_q - log_p).masked_fill(neither, 0.0), _later(off_z, log_p), _later(off_r, log_q), z

    def _sums(self, cols: slice) -> tuple[Tensor, ...]:
        """Of the columns: KL; what p, q and KL weigh errors of logits to; the latter's second order; the largest
        log-ratio of p and q, as far as FAR."""
        log_p, log_q, ratio, off_z, off_r, _ = self._pair(cols)
        p, q = log_p.exp(), log_q.exp()
        finite = ratio.clamp(-1e30, 1e30)
        kl = (q * finite).sum(1)
        kl = kl.masked_fill(((log_p == -torch.inf) & (log_q > -torch.inf)).any(1), torch.inf)
        off_kl = (_difference(p, q, ratio).abs() * off_z + q * finite.abs() * off_r).sum(1)
        second = (torch.maximum(p, q) * (off_z**2 + off_r**2)).sum(1)
        apart = (finite.abs().clamp(max=FAR) * (torch.maximum(p, q) > TINY)).amax(1)
        return kl, (p * off_z).sum(1), (q * off_r).sum(1), off_kl, second, apart

    def _at_labels(self, side: _Side, lse: Tensor) -> tuple[Tensor, Tensor]:
        z, off = (x.diagonal() for x in side.logits(self.labels))
        return z - lse, off

    def dz(self, cols: Tensor, g_logp: Tensor, g_kl: Tensor, staged: bool) -> tuple[Tensor, Tensor]:
        """Eq. (6) at the outputs of ``h W^T + b``, and what it may be off, in columns `cols`."""
        log_p, log_q, ratio, off_z, off_r, z = self._pair(cols)
        p, q = log_p.exp(), log_q.exp()
        g_logp, g_kl = g_logp[:, None], g_kl[:, None]
        is_label = cols == self.labels[:, None]
        label = torch.where(is_label, -torch.expm1(log_p), -p)
        difference = _difference(p, q, ratio)
        dz = g_logp * label - g_kl * difference
        off_p, off_q = p * (off_z + self.off_z[:, None]) + TINY, q * (off_r + self.off_r[:, None]) + TINY
        off = g_logp.abs() * off_p + g_kl.abs() * (off_p + off_q) + 8 * EPS * dz.abs()
        if staged:
            t = 2 * self.apart[:, None]  # within a part of the vocabulary, log p / q is larger by one of its averages
            off = off + (g_logp.abs() + g_kl.abs()) * math.exp(-FAR)
            rounded = g_logp.abs() * p * (1 + t) + g_kl.abs() * (difference.abs() + torch.maximum(p, q) * t) + dz.abs()
            off = off + rounded * (STAGED if self.inputs.policy.dtype in SIXTEEN_BIT else 16 * EPS)
        slope, off_slope = self.z.slope(z, off_z)
        return dz * slope, MARGIN * (off * slope.abs() + dz.abs() * off_slope)


def _later(off: Tensor, log_p: Tensor) -> Tensor:
    """Errors of logits, and what subtracting tops and taking exponentials adds to them."""
    return off + 4 * EPS * (1 + log_p.abs().clamp(max=200.0))


def _difference(p: Tensor, q: Tensor, ratio: Tensor) -> Tensor:
    """``q - p``, where they agree from ``log(q / p)``."""
    return torch.where(ratio.abs() < 1, p * torch.expm1(ratio.clamp(-1, 1)), q - p)


# --- what is said -----------------------------------------------------------------------------------------------------


class Finding:
    """Comparisons collected on the device, read once."""

    def __init__(self, odd: list[tuple[str, Tensor]]) -> None:
        self._odd = odd
        self._compared: list[tuple[str, Tensor, Tensor, Tensor, list[int], list[int] | None]] = []

    def add(
        self, name: str, found: Tensor, want: Tensor, allowed: Tensor, rows: list[int], columns: list[int] | None
    ) -> None:
        self._compared.append((name, found, want, allowed, rows, columns))

    @property
    def odd(self) -> list[str]:
        """What is not finite."""
        if not self._odd:
            return []
        flags = torch.stack([flag for _, flag in self._odd]).tolist()
        return [f"{name} is not finite" for name in dict.fromkeys(n for (n, _), f in zip(self._odd, flags, strict=True) if f)]  # fmt: skip # noqa: E501

    @property
    def fault(self) -> str:
        """The worst entry of everything compared, in words; empty if there is none, or nothing to judge by."""
        if self.odd or not self._compared:
            return ""
        worst = torch.stack([_excess(*parts[1:4]).amax() for parts in self._compared]).tolist()
        wrong = sum(int((_excess(*parts[1:4]) > 1).sum()) for parts in self._compared) if max(worst) > 1 else 0
        if not wrong:
            return ""
        name, found, want, allowed, rows, columns = self._compared[worst.index(max(worst))]
        i, j = divmod(int(_excess(found, want, allowed).argmax()), found.shape[1])
        place = f"row {rows[i]}" + ("" if columns is None else f", column {columns[j]}")
        f, w, a = (x[i, j].item() for x in (found, want, allowed))
        compared = sum(parts[1].numel() for parts in self._compared)
        return (
            f"  worst:    {name} at {place}: found {f:.9g}, expected {w:.9g}; off by {abs(f - w):.3g}, "
            f"{a:.3g} is allowed\n  wrong:    {wrong} of {compared} sampled numbers"
        )


def _excess(found: Tensor, want: Tensor, allowed: Tensor) -> Tensor:
    """Errors in units of what is allowed; equal infinities are no error, NaN is the worst."""
    error = (found - want).abs().masked_fill(found == want, 0.0) / allowed.nan_to_num(0.0).clamp(min=1e-300)
    return error.nan_to_num(torch.inf, torch.inf)


def _report(inputs: Inputs, launches: list[Launch], finding: Finding) -> str:
    lines = [
        "tdpo_kernels: a kernel disagrees with float64 on the inputs of this call, the first of its kind here.",
        finding.fault,
        *(f"  kernel:   {launch}" for launch in launches),
        f"  device:   {_device(inputs.policy.hidden.device)}",
        f"  versions: {_versions(inputs.policy.hidden.device)}",
        *(f"  {name + ':':26}{x}" for name, x in _tensors(inputs)),
        f"  rows that count: {inputs.rows.count}; extras: {inputs.extras or 'none'}; "
        f"memory_budget: {inputs.memory_budget}",
        f'What to do: backend="naive" uses no kernels. {SWITCH}=0 in the environment turns this check off.',
        "Please report this text: it may be a compiler's bug, and others will meet it.",
    ]
    return "\n".join(lines)


def _tensors(inputs: Inputs) -> Iterable[tuple[str, str]]:
    for prefix, model in (("", inputs.policy), ("ref_", inputs.reference)):
        head = model.head
        for name, x in (("hidden", model.hidden), ("head.weight", head.weight), ("head.bias", head.bias)):
            yield prefix + name, "none" if x is None else _describe(x)
        yield f"{prefix}head", f"logit_scale {head.logit_scale}, softcap {head.softcap}, computed in {model.dtype}"
    rows = inputs.rows
    for name, x in (("labels", rows.labels_T), ("row index", rows.hidden_T)):
        yield name, "none" if x is None else _describe(x)


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype}, strides {x.stride()}, address {x.data_ptr() % 256} mod 256"


def _device(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{device}, {platform.machine()}"
    properties = torch.cuda.get_device_properties(device)
    return f"{device}, {properties.name}, capability {properties.major}.{properties.minor}"


def _versions(device: torch.device) -> str:
    import triton

    runtime = f"hip {torch.version.hip}" if torch.version.hip else f"cuda {torch.version.cuda}"
    interpreted = ", interpreted" if triton.knobs.runtime.interpret else ""
    return (
        f"tdpo_kernels {__version__}, torch {torch.__version__}, triton {triton.__version__}{interpreted}, {runtime}, "
        f"ptxas {_ptxas()}, python {platform.python_version()}"
    )


def _ptxas() -> str:
    try:
        from triton import knobs

        said = subprocess.run([knobs.nvidia.ptxas.path, "--version"], capture_output=True, text=True, timeout=10).stdout
        return re.search(r"V(\d[\d.]*)", said).group(1)
    except Exception as error:  # a report is worth more than this line of it
        return f"unknown ({type(error).__name__})"


# --- process groups ---------------------------------------------------------------------------------------------------


class _Peers:
    """Agreement between the ranks of the default process group, so that none raises while another waits for it.

    No collective: ranks need not check the same things, nor at all, and a collective that some do not join hangs.
    Instead each rank counts itself, in the store that the group was made with, into its n-th check and out of it again.
    On the way out it waits for those that are in, who wait for nobody while there, and for the others at most
    GRACE seconds, and that once: ranks that have not come then may have nothing to check. So every wait is bounded.
    A rank that finds a fault leaves it in the store first; whoever checks then or later finds it there, and raises too.
    """

    PREFIX = "tdpo_kernels/selfcheck"
    GRACE = 10.0
    PATIENCE = 60.0  # with ranks that are in a check
    lock = threading.Lock()
    known: tuple[Any, int, bool] = (None, 0, False)  # the store, checks so far, whether some rank did not come

    def __init__(self, store: Any, n: int, alone: bool) -> None:
        self.store, self.n, self.alone = store, n, alone

    @classmethod
    def enter(cls) -> _Peers:
        store = _store()
        with cls.lock:
            known, n, alone = cls.known
            n, alone = (n + 1, alone) if store is known else (1, False)
            cls.known = store, n, alone
        peers = cls(store, n, alone)
        try:
            peers._count("entered", 1)
        except RuntimeError:  # the store is gone, and its owner with it
            peers.store = None
        return peers

    def leave(self, fault: str) -> str:
        """The fault that any rank found, or nothing."""
        if self.store is None:
            return ""
        try:
            if fault:
                self.store.set(f"{self.PREFIX}/fault", f"rank {torch.distributed.get_rank()}: {fault}")
            self._count("judged", 1)
            if not self.alone:
                self._await_everyone()
            _wait(lambda: self._count("judged") >= self._count("entered"), self.PATIENCE)
            found = self.store.get(f"{self.PREFIX}/fault").decode() if self._has_fault() else ""
            self._count("read", 1)
            if found:  # the store may end with this process
                _wait(lambda: self._count("read") >= self._count("entered"), self.PATIENCE)
            return found
        except RuntimeError:  # the store is gone, and its owner with it
            return ""

    def _await_everyone(self) -> None:
        world = torch.distributed.get_world_size()
        if not _wait(lambda: self._count("entered") >= world or self._has_fault(), self.GRACE):
            type(self).known = self.store, self.n, True

    def _has_fault(self) -> bool:
        return self.store.check([f"{self.PREFIX}/fault"])

    def _count(self, what: str, more: int = 0) -> int:
        return 0 if self.store is None else self.store.add(f"{self.PREFIX}/{self.n}/{what}", more)


def _store() -> Any:
    """None where there is nobody to agree with, or no way to."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    get = getattr(distributed.distributed_c10d, "_get_default_store", None)
    return get() if get else None


def _wait(reached: Callable[[], bool], seconds: float) -> bool:
    end, pause = time.monotonic() + seconds, 0.001
    while not reached():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    return True
