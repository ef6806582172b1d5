"""Host side of the device code: what runs where, and launches by pointers or descriptors.

Operands are blocks already cut to the rows and columns at hand: two tiles of products for the kernels that reduce them,
or for those that multiply four matrices h, w, g, u, both models' hidden states and weights. Labels count from the
vocabulary's first column, which lies `col` before the block's; one outside of the block is not in it.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tuning import Case, Device, TileConfig, choose, family_of
from ..types import LMHead


class Head(NamedTuple):
    """Hold what a kernel knows of a head besides its weight."""

    bias: Tensor | None
    scale: float
    softcap: float | None


class Strides(NamedTuple):
    """Between the rows of both models' hidden states and weights; None where a kernel is given a descriptor."""

    h: int | None
    w: int | None
    g: int | None
    u: int | None


@dataclass(frozen=True)
class Launch:
    """Tell one compiled kernel from another, and for which hidden sizes D and E it was launched."""

    kernel: str
    widths: tuple[int, ...]
    config: TileConfig
    case: Case
    tensors: tuple[tuple[torch.dtype, bool, bool], ...]  # dtype; whether 16 divides the address, and the row stride
    heads: tuple[tuple[bool, bool], ...]  # whether there is a bias, and a softcap
    device: torch.device


@cache
def unavailable(device: torch.device) -> str:
    """Return why no kernel runs on `device`, or "". It is settled at the first call, as Triton does at its import."""
    if device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        return f"Triton has no compiler for {device.type} here; TRITON_INTERPRET=1 runs kernels on a CPU, for tests"
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if device.type == "cuda":
        return _cuda_lacks(device)
    if device.type != "cpu" or not triton.knobs.runtime.interpret:
        return f"Triton's interpreter runs on a CPU, not on {device.type}, and where it was asked for before Triton"
    numpy = importlib.metadata.version("numpy")
    too_new = triton.__version__.startswith("3.6.") and tuple(map(int, numpy.split(".")[:2])) >= (2, 4)
    return f"the interpreter of Triton 3.6 wants numpy < 2.4, this is {numpy}" if too_new else ""


def _cuda_lacks(device: torch.device) -> str:
    """Return what Triton misses to compile and launch on `device`, or ""."""
    import triton

    try:
        family_of(device_of(device).arch)
    except ValueError as error:
        return str(error)
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or triton.knobs.build.impl):
        return "Triton launches through code that it compiles, and finds no C compiler: install gcc, or name one in CC"
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # such as Python's headers or the driver's library not being there
        return f"Triton does not start: {type(error).__name__}: {error}".splitlines()[0]
    return ""


@lru_cache
def device_of(device: torch.device) -> Device:
    """Return what the choice of a configuration knows of a device."""
    if device.type != "cuda":
        return Device("interpreter", "interpreter")
    has = torch.cuda.get_device_properties(device)
    return Device(has.name, has.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{has.major}{has.minor}")


def precision(dtype: torch.dtype) -> str:
    """Return how fp32 is multiplied: as torch is told to. Other dtypes have only one way."""
    said = torch.backends.cuda.matmul.fp32_precision  # its older getter raises once the newer setting was used
    tf32 = (torch.backends.fp32_precision if said == "none" else said) == "tf32"
    return "tf32" if dtype == torch.float32 and tf32 and not torch.version.hip else "ieee"


class Kernels:
    """Launch the kernels of one call. A configuration, which never depends on the number of rows, is chosen once."""

    def __init__(
        self, heads: Sequence[LMHead], dtypes: Sequence[torch.dtype], extras: bool, device: torch.device,
        aligned: bool = True,
    ) -> None:  # fmt: skip
        """Take the policy's and the reference's head, multiplied in `dtypes`; `aligned` is of all four matrices."""
        weights = [(x.data_ptr(), x.shape, x.stride(), x.dtype) for x in (head.weight for head in heads)]
        self.precision = precision(dtypes[0])
        self.case = Case(
            kernel="",
            product="16bit" if max(dtype.itemsize for dtype in dtypes) == 2 else self.precision,
            one_head=weights[0] == weights[1] and dtypes[0] == dtypes[1],
            bias=any(head.bias is not None for head in heads),
            softcap=any(head.softcap is not None for head in heads),
            extras=extras, aligned=aligned,
        )  # fmt: skip
        self.device, self.widths, self.columns = device_of(device), tuple(x.weight.shape[1] for x in heads), 0
        self.launched, self.prepared = dict[str, Launch](), dict[str, tuple[Any, TileConfig, dict[str, Any]]]()
        self.described = dict[str, tuple[int, torch.Size, Any]]()

    def config(self, kernel: str) -> TileConfig:
        """Return a kernel's configuration; `columns` is the width of tiles in memory."""
        columns = 0 if kernel.startswith("fused") else self.columns
        return choose(replace(self.case, kernel=kernel, columns=columns), self.device, self.widths[0])

    def prepare(self, kernel: str) -> tuple[Any, TileConfig, dict[str, Any]]:
        """Return a kernel, its configuration, and the constants and options of its launches."""
        if kernel not in self.prepared:
            config = self.config(kernel)
            constants = dict(R=config.R, C=config.C) | config.options
            constants |= dict(K=config.K, PRECISION=self.precision) if kernel.startswith("fused") else {}
            constants |= dict(EXTRAS=self.case.extras) if kernel.endswith("stats") else {}
            self.prepared[kernel] = _device_code(kernel), config, constants
        return self.prepared[kernel]

    def stats(
        self, operands: Sequence[Tensor], heads: Sequence[Head], labels_R: Tensor, col: int,
        states: Tensor, label_logits: Tensor, kept: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Fill `states` ``(parts, STATE (+ 2), R)``, contiguous, `label_logits` ``(2, R)`` of labels that are here, and
        `kept` ``(2, R, C)`` with both products, if these are made here."""
        kernel, V, given = self._given("stats", operands)
        if len(operands) == 4:
            plane, stride = (0, 0) if kept is None else kept.stride()[:2]
            given |= dict(kept=states.new_empty(0) if kept is None else kept, stride_kept=stride, plane=plane)
            given |= dict(u=None) if self.case.one_head else {}
        given |= dict(states=states, label_logits=label_logits, stride_labels=label_logits.stride(0))
        self.launch(kernel, len(labels_R), V, operands, heads, labels=labels_R, col=col, **given)

    def dz(
        self, operands: Sequence[Tensor], heads: Sequence[Head], labels_R: Tensor, col: int, row_R: Tensor, out: Tensor
    ) -> None:
        """Fill `out` ``(R, C)`` with dz from `row_R` ``(ROW, R)``, a view of rows with one stride. A tile that no row
        needs is not read; the policy's is needed where it has a softcap."""
        kernel, V, given = self._given("dz", operands)
        given |= dict(row_values=row_R, stride_rows=row_R.stride(0), dz=out, stride_dz=out.stride(0))
        self.launch(kernel, len(labels_R), V, (*operands, out), heads, labels=labels_R, col=col, **given)

    def launch(
        self, kernel: str, T: int, V: int, tensors: Sequence[Tensor], heads: Sequence[Head], **arguments: Any
    ) -> None:
        """Launch a kernel on T rows and V columns, and note the first time which binary that is: it is compiled for
        the dtypes and the alignment of `tensors` and of the heads."""
        code, config, constants = self.prepare(kernel)
        blocks = -(-T // config.R), -(-V // config.C)
        try:
            code[blocks](head=heads[0], ref_head=heads[1], T=T, V=V, **arguments, **constants)
        except Exception as error:
            if type(error).__name__ != "OutOfResources":
                raise
            raise RuntimeError(f"{kernel}: {config} is too large for {self.device}: {error}") from error
        if kernel not in self.launched:
            every = [*tensors, *(head.bias for head in heads if head.bias is not None)]
            known = tuple((x.dtype, x.data_ptr() % 16 == 0, x.stride(0) % 16 == 0) for x in every)
            has = tuple((head.bias is not None, head.softcap is not None) for head in heads)
            self.launched[kernel] = Launch(kernel, self.widths, config, self.case, known, has, every[0].device)

    def _given(self, what: str, operands: Sequence[Tensor]) -> tuple[str, int, dict[str, Any]]:
        """Return the kernel that takes these operands, their columns, and the operands by the kernel's names."""
        if len(operands) == 2:
            z, r = operands
            return f"tile_{what}", z.shape[1], dict(z_tile=z, r_tile=r, stride=z.stride(0))
        kernel, (h, w, g, u) = f"fused_{what}", operands
        config, strides = self.prepare(kernel)[1], Strides(None, None, None, None)
        given = dict(h=h, w=w, g=g, u=u)
        if config.tma:
            given = {name: self._described(name, x, config) for name, x in given.items()}
        else:
            strides = Strides(*(x.stride(0) for x in operands))
        return kernel, len(w), given | dict(D=h.shape[1], E=g.shape[1], strides=strides)

    def _described(self, name: str, x: Tensor, config: TileConfig) -> Any:
        """Return a descriptor of x, the last one of this name if that will do."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        have, box = self.described.get(name), [config.R if name in "hg" else config.C, config.K]
        if have is None or have[:2] != (x.data_ptr(), x.shape) or have[2].block_shape != box:
            have = self.described[name] = x.data_ptr(), x.shape, TensorDescriptor.from_tensor(x, box)
        return have[2]


@cache
def _device_code(kernel: str) -> Any:
    from ..device import dlogits, rows, stats

    return next(vars(module)[kernel] for module in (stats, dlogits, rows) if kernel in vars(module))


def head_of(head: LMHead, bias_C: Tensor | None) -> Head:
    """Return what kernels know of `head`; `bias_C`: of the columns at hand, contiguous, in the products' dtype."""
    return Head(bias_C, float(head.logit_scale), None if head.softcap is None else float(head.softcap))
