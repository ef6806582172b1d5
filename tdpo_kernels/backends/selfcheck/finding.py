"""Comparisons, and what is said of one that fails: all that a bug report needs."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterable

import torch
from torch import Tensor

from ...types import Inputs
from ...version import __version__
from ..launch import Launch

SWITCH = "TDPO_KERNELS_SELF_CHECK"


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
        names = dict.fromkeys(name for (name, _), flag in zip(self._odd, flags, strict=True) if flag)
        return [f"{name} is not finite" for name in names]

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


def report(inputs: Inputs, launches: list[Launch], finding: Finding) -> str:
    lines = [
        "tdpo_kernels: a kernel disagrees with float64 on the inputs of this call, the first of its kind here.",
        finding.fault,
        *(f"  kernel:   {launch}" for launch in launches),
        f"  device:   {_device(inputs.policy.hidden.device)}",
        f"  versions: {_versions()}",
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


def _versions() -> str:
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
