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

Under a process group all ranks raise together (`Peers`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ...types import Forward, Inputs
from ..launch import Launch
from ..slab import Grid
from .finding import SWITCH, Finding, report
from .peers import Peers
from .sample import ROWS, Sample, indices
from .truth import Rows

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
        rows = indices(grid.T, grid.R, fresh[0].config.R, ROWS)
        truth = Rows(inputs, torch.tensor(rows, device=out.logp_T.device))
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
        cotangents: of logp, of the KL, and of the label's logit.
        scale: of dz as the kernels write it.
    """

    def __init__(self, inputs: Inputs, grid: Grid, cotangents: tuple[Tensor | None, ...], scale: float) -> None:
        self.inputs, self.grid, self.cotangents, self.scale = inputs, grid, cotangents, scale
        self.samples: dict[Launch, Sample] = {}
        self.off = False

    def see(self, launch: Launch, rows: slice, cols: slice, dz: Tensor) -> None:
        """dz ``(R, C)`` of these rows and columns, not yet used for anything else."""
        if self.off or not _fresh(self.inputs, [launch]):
            return
        if not self.samples and not _may_check(self.inputs):
            self.off = True
            return
        if launch not in self.samples:
            self.samples[launch] = Sample(self.inputs, self.grid, launch)
        self.samples[launch].take(rows, cols, dz)

    def verdict(self) -> None:
        """RuntimeError if anything seen was wrong."""
        for launch, sample in self.samples.items():
            _judge(self.inputs, [launch], lambda sample=sample: sample.compare(self.cotangents, self.scale))


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
    peers, fault = Peers.enter(), ""
    finding: Finding | None = None
    try:
        finding = compare()
        fault = finding.fault and report(inputs, launches, finding)
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
