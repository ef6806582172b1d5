"""What the sampled rows should be, in float64 from the inputs alone, and how far off a kernel may be there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...types import Inputs, Model
from ..launch import tf32_is_allowed
from ..products import SIXTEEN_BIT, logits_, operand_dtype
from ..tile_math import is_lowest

CHUNK = 2**23  # float64 numbers of a chunk of weights, 64 MiB; an eighth of that on a CPU
MARGIN = 2.0
EPS = torch.finfo(torch.float32).eps
TINY = 1e-36  # what flushing subnormals may lose, of a probability
STAGED = 2.0**-8  # p, t and the slope are rounded to bf16, and rows' sums made up for it: twice 2^-9
FAR = 30.0  # log-ratios beyond are staged as if they were no larger (`tile_math.largest_exponent`)
LARGEST = 1e29  # logits beyond are no numbers to the kernels (`tile_math.LOWEST`)


@dataclass(eq=False)
class Side:
    """One model's sampled rows: its logits in float64, and how far from them a kernel's may be.

    unit: the worst error of the library's product of the same operands, in units of ``|h| |w|``.
    """

    model: Model
    hidden: Tensor  # (R, D), rounded to the dtype of the products
    unit: Tensor

    @staticmethod
    def of(model: Model, at: Tensor) -> Side:
        hidden = model.hidden.detach()[at].to(model.dtype)
        return Side(model, hidden, torch.zeros((), dtype=torch.float64, device=hidden.device))

    def measure(self, cols: slice) -> None:
        """`unit` is the largest of all that is measured."""
        weight = self.model.head.weight.detach()[cols].to(self.model.dtype)
        dtype = operand_dtype(self.model.dtype, torch.float32, weight.device)
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
class Rows:
    """The truth about sampled rows, from the inputs alone. `odd`: what there is not to be judged by."""

    inputs: Inputs
    at: Tensor  # (R,) of the T rows
    odd: list[tuple[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rows = self.inputs.rows
        hidden = self.at if rows.hidden_T is None else rows.hidden_T[self.at]
        self.labels = rows.labels_T[self.at]
        self.own = torch.ones_like(self.labels, dtype=torch.bool) if rows.own_T is None else rows.own_T[self.at]
        self.z, self.r = Side.of(self.inputs.policy, hidden), Side.of(self.inputs.reference, hidden)

    def only(self, n: Tensor) -> Rows:
        """Some of them, statistics included."""
        part = object.__new__(Rows)
        part.inputs, part.odd, part.at = self.inputs, self.odd, self.at[n]
        part.labels, part.own = self.labels[n], self.own[n]
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
                size = logits.masked_fill(logits == -torch.inf, 0).abs()
                self.expect("logits, as large as they are,", ~(size > LARGEST).any())
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
        V = self.inputs.policy.head.weight.shape[0]
        width = max(self.z.hidden.shape[1], self.r.hidden.shape[1], len(self.at))
        step = max((CHUNK if self.at.is_cuda else CHUNK // 8) // width, 64)
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

    def _at_labels(self, side: Side, lse: Tensor) -> tuple[Tensor, Tensor]:
        z, off = (x.diagonal() for x in side.logits(self.labels))
        return z - lse, off

    def dz(self, cols: Tensor, g_3R: Tensor, staged: bool) -> tuple[Tensor, Tensor]:
        """Eq. (6) at the outputs of ``h W^T + b``, and what it may be off, in columns `cols`."""
        log_p, log_q, ratio, off_z, off_r, z = self._pair(cols)
        p, q = log_p.exp(), log_q.exp()
        g_logp, g_kl, g_label = g_3R[..., None]
        is_label = (cols == self.labels[:, None]) & self.own[:, None]
        label = torch.where(is_label, -torch.expm1(log_p), -p)
        difference = _difference(p, q, ratio)
        dz = g_logp * label - g_kl * difference + g_label * is_label
        off_p, off_q = p * (off_z + self.off_z[:, None]) + TINY, q * (off_r + self.off_r[:, None]) + TINY
        terms = (g_logp * label).abs() + g_label.abs() * is_label  # of a part of a vocabulary they may cancel
        off = g_logp.abs() * off_p + g_kl.abs() * (off_p + off_q) + 8 * EPS * torch.maximum(dz.abs(), terms)
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
