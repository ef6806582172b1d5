"""Check a kernel the first time a process uses it, on 64 rows and 64 columns of the launch at hand.

The truth is float64, from the inputs alone. Rounding never exceeds the bounds, a miscompiled kernel does: it makes
garbage. A kernel that has passed costs a look into a set. Nothing is checked while a CUDA graph is captured, or on
numbers that are not finite; the check is then made at a later call.

``TDPO_KERNELS_SELF_CHECK=0`` in the environment turns it off, and ``=warn`` makes it warn and go on where it would
raise. Either way what was found is written to a file, in the current directory or else a temporary one.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..types import Inputs, Part, Workspace
from ..version import __version__
from . import rowmath
from .grid import Grid, size
from .launch import Kernels, Launch, precision
from .logits import Operand, affine_, capped

SWITCH = "TDPO_KERNELS_SELF_CHECK"
SAMPLE = 64
CHUNK = 2**14  # columns of float64 logits at once
_passed: set[Launch] = set()


class Check:
    """Check the launches of one call that are new to the process."""

    def __init__(self, inputs: Inputs, grid: Grid, kernels: Kernels) -> None:
        self.inputs, self.grid, self.kernels, self.looked = inputs, grid, kernels, set[str]()
        capturing = inputs.policy.hidden.is_cuda and torch.cuda.is_current_stream_capturing()
        self.on = os.environ.get(SWITCH, "1") != "0" and not capturing

    def _fresh(self, names: Iterable[str]) -> list[Launch]:
        """Return what was launched by these names and is new to the process, once in a call."""
        names = [name for name in names if self.on and name not in self.looked]
        self.looked.update(names)
        return [launch for launch in map(self.kernels.launched.get, names) if launch not in _passed]

    def forward(self, part: Part) -> Part:
        """Compare L, L', the KL and the labels' logits of sampled rows, if a launch is new, and return `part`."""
        fresh = self._fresh(self.kernels.launched) if self.grid.T else []
        if fresh:
            rows = _spread(self.grid.T, part.state.device)
            truth, labels, slack = self._statistics(rows)
            state, unit = part.state[:6, rows].double(), slack.sum(0)
            apart = torch.stack([state[0] + state[2], state[1] + state[3], state[4]])
            want = torch.stack([truth[0] + truth[2], truth[1] + truth[3], truth[4]])
            allowed = torch.stack([slack[0], slack[1], 4 * unit * (1 + want[2]) + unit * unit])
            found, want = torch.cat([apart, part.labels[:, rows].double()]), torch.cat([want, labels])
            self._judge(fresh, found, want, torch.cat([allowed, slack]) + 1e-4 * (1 + want.abs()))
        return part

    def dz(self, kernel: str, rows: slice, cols: slice, row_R: Tensor, dz: Tensor) -> Tensor:
        """Compare sampled entries of dz, if the launch is new, and return `dz`."""
        if kernel not in self.looked and (fresh := self._fresh([kernel])):
            r, c = _spread(size(rows), dz.device), _spread(size(cols), dz.device)
            want, allowed = self._dz(r + rows.start, c + cols.start, row_R[:, r].double())
            self._judge(fresh, dz[r][:, c].double(), want, allowed + 4 * torch.finfo(dz.dtype).eps * want.abs())
        return dz

    def _judge(self, launches: list[Launch], found: Tensor, want: Tensor, allowed: Tensor) -> None:
        if not (torch.isfinite(want) & torch.isfinite(allowed)).all():
            return
        wrong = ~((found - want).abs() <= allowed)
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            numbers = dict(found=found[at].item(), expected=want[at].item(), wrong=int(wrong.sum()), of=wrong.numel())
            report = _report(self.inputs, launches, numbers)
            if os.environ.get(SWITCH) != "warn":
                raise RuntimeError(report)
            warnings.warn(report, RuntimeWarning, stacklevel=2)
        _passed.update(launches)

    def _statistics(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the true states of `rows`, their labels' logits, and how far off each model's logits may be."""
        V, y = self.grid.V, self.inputs.rows.labels_T[rows]
        inside, at = ((y >= 0) & (y < V))[:, None], y.clamp(0, V - 1)[:, None]
        states, labels, slack = [], 0, 0
        for a in range(0, V, CHUNK):
            cols = torch.arange(a, min(a + CHUNK, V), device=rows.device)
            (z, _, off), (r, _, ref_off) = self._logits(rows, cols)
            here = inside & (at == cols)
            labels = labels + torch.stack([torch.where(here, x, 0.0).sum(1) for x in (z, r)])
            slack = torch.stack([off, ref_off]).maximum(torch.as_tensor(slack))
            z, r = (x.masked_fill(here, rowmath.LOWEST) for x in (z, r))
            states.append(rowmath.part(z, r, (), Workspace(z.device)))
        return rowmath.merge(torch.stack(states)), labels, slack

    def _dz(self, rows: Tensor, cols: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Return the true dz, and how far off a sound kernel's may be."""
        (z, x, off), (r, _, ref_off) = self._logits(rows, cols)
        top_z, top_r, lse_z, lse_r, _, a, b, c, label = row[..., None].unbind()
        p, q = (z - top_z - lse_z).exp(), (r - top_r - lse_r).exp()
        head = self.inputs.policy.head
        slope = 1.0 if head.softcap is None else rowmath.softcap_slope(x, head.softcap)
        dz = torch.where(cols == self.inputs.rows.labels_T[rows, None], label, b * q + c * (p - q)) * slope
        grown = torch.expm1(4 * (off + ref_off))[:, None] + 1e-3
        return dz, grown * ((b.abs() + c.abs()) * (p + q) + dz.abs()) + 1e-30

    def _logits(self, rows: Tensor, cols: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return each model's logits after and before its softcap, and how far off they may be."""
        index, found = self.inputs.rows.hidden_T, []
        rows, every = rows if index is None else index[rows], slice(0, len(rows))
        for model in (self.inputs.policy, self.inputs.reference):
            head, dtype = model.head, model.dtype
            h = Operand(Workspace(rows.device), "", model.hidden, rows, dtype).block(every, dtype).double()
            w = head.weight.index_select(0, cols).to(dtype).double()
            bias = None if head.bias is None else head.bias[cols].to(dtype).double()
            sizes = h.norm(dim=1) * w.norm(dim=1).amax() * abs(head.logit_scale)
            rounded = 2.0**-9 if precision(dtype) == "tf32" else 0.0
            x = affine_(h @ w.T, head, bias)
            z = x if head.softcap is None else capped(x, head, bias, torch.empty_like(x))
            found.append((z, x, sizes * ((h.shape[1] / 16 + 8) * 2.0**-24 + rounded)))
        return found


def _spread(length: int, device: torch.device) -> Tensor:
    """Return up to SAMPLE indices, evenly from the first to the last."""
    return torch.linspace(0, length - 1, min(SAMPLE, length), device=device).long()


def _report(inputs: Inputs, launches: list[Launch], numbers: dict[str, float]) -> str:
    """Write what a bug report needs to a file, and return it in words."""
    import triton

    device, sides = inputs.policy.hidden.device, (inputs.policy, inputs.reference)
    facts = numbers | dict(
        kernels=[str(launch) for launch in launches],
        inputs=[f"{x.dtype} {tuple(x.shape)}" for side in sides for x in (side.hidden, side.head.weight)],
        rows=inputs.rows.count, extras=inputs.extras,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        tdpo_kernels=__version__, torch=torch.__version__, triton=triton.__version__,
        cuda=torch.version.cuda or torch.version.hip, python=platform.python_version(),
    )  # fmt: skip
    folder = os.getcwd() if os.access(".", os.W_OK) else tempfile.gettempdir()
    path = Path(folder, f"tdpo-kernels-self-check-{os.getpid()}-{launches[0].kernel}.json")
    path.write_text(json.dumps(facts, indent=1))
    return "\n".join([
        "tdpo_kernels: a kernel disagrees with float64 on the inputs of this call, the first of its kind here.",
        *(f"  {key}: {value}" for key, value in facts.items()),
        f'What to do: backend="naive" uses no kernels; {SWITCH}=warn warns and goes on, {SWITCH}=0 does not look.',
        f"Please report this, with {path}: it may be a compiler's bug, and others will meet it.",
    ])  # fmt: skip
