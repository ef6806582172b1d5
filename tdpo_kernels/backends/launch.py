"""Host side of the device code: what runs where, pointers or descriptors, grids; one function per kernel.

Operands are blocks already cut to the rows and columns at hand. Labels count from the vocabulary's first column, which
lies `col` before the block's; one outside of the block is not in it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tuning import Case, Device, TileConfig, choose, family_of
from ..types import LMHead

STATE, EXTRAS, ROWS = 6, 2, 9  # rows of a part's state, of its extras, of what backward knows of a row
INTERPRETED = Device("interpreter", "interpreter")


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


@dataclass(frozen=True, eq=False)
class Operands:
    """One model's share of a tile: hidden states ``(R, D)``, weight rows ``(C, D)``, and its head."""

    hidden: Tensor
    weight: Tensor
    head: Head


@dataclass(frozen=True)
class Launch:
    """Tell one compiled kernel from another. `flags`: names and values of the constexprs but the tile's, and
    which arguments are None or multiples of 16."""

    kernel: str
    config: TileConfig
    dtypes: tuple[torch.dtype, ...]
    flags: tuple[tuple[str, Any], ...]
    device: torch.device

    def __str__(self) -> str:
        flags = " ".join(f"{name}={value}" for name, value in self.flags)
        dtypes = ", ".join(str(x).removeprefix("torch.") for x in self.dtypes)
        return f"{self.kernel} with {self.config!r}, {dtypes}, {flags}, on {self.device}"


@cache
def unavailable(device: torch.device) -> str:
    """Return why no kernel runs on `device`, or "". It is settled at the first call, as Triton does at its import."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        try:
            family_of(device_of(device).arch)
        except ValueError as error:
            return str(error)
        return ""
    if os.environ.get("TRITON_INTERPRET") and _interpreting():
        return "" if device.type == "cpu" else f"the interpreter runs on a CPU, not on {device.type}"
    return f"Triton has no compiler for {device.type}; TRITON_INTERPRET=1 runs the kernels on a CPU, slowly, for tests"


def _interpreting() -> bool:
    import triton

    return triton.knobs.runtime.interpret


@lru_cache
def device_of(device: torch.device) -> Device:
    """Return what the choice of a configuration knows of a device."""
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    arch = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return Device(properties.name, arch)


def precision(dtype: torch.dtype) -> str:
    """Return how fp32 is multiplied: as torch is told to. Other dtypes have only one way."""
    return "tf32" if dtype == torch.float32 and tf32_is_allowed() and not torch.version.hip else "ieee"


def tf32_is_allowed() -> bool:
    """Return whether torch was told so, whichever way: the older getter raises once the newer setting was used."""
    said = torch.backends.cuda.matmul.fp32_precision
    return (torch.backends.fp32_precision if said == "none" else said) == "tf32"


@dataclass(frozen=True)
class Traits:
    """Hold what the configurations of one call depend on, which is never the number of rows."""

    case: Case  # of any kernel
    device: Device
    width: int

    def config(self, kernel: str, columns: int = 0) -> TileConfig:
        """Return a kernel's configuration; `columns` is the width of a tile in memory."""
        return _config(self, kernel, columns)


@lru_cache(maxsize=4096)
def _config(traits: Traits, kernel: str, columns: int) -> TileConfig:
    return choose(replace(traits.case, kernel=kernel, columns=columns), traits.device, traits.width)


def traits_of(
    heads: Sequence[LMHead], dtypes: Sequence[torch.dtype], extras: bool, device: torch.device, aligned: bool = True
) -> Traits:
    """Return the traits of a call on the policy's and the reference's head, multiplied in `dtypes`.

    Args:
        aligned: base and row stride of all four matrices that kernels are given are multiples of 16 bytes (`aligned`).
    """
    itemsize = max(dtype.itemsize for dtype in dtypes)
    weights = [(x.data_ptr(), x.shape, x.stride(), x.dtype) for x in (head.weight for head in heads)]
    case = Case(
        kernel="fused_stats",
        product="16bit" if itemsize == 2 else precision(torch.float32),
        one_head=weights[0] == weights[1] and dtypes[0] == dtypes[1],
        bias=any(head.bias is not None for head in heads),
        softcap=any(head.softcap is not None for head in heads),
        extras=extras,
        aligned=aligned,
    )
    return Traits(case, device_of(device), heads[0].weight.shape[1])


def aligned(x: Tensor) -> bool:
    """Return whether TMA takes x and every block of its rows: base and row stride in multiples of 16 bytes, rows apart.
    A packed copy of x, where kernels are given that, is to be asked about as ``x.new_empty(0, D)`` of its dtype."""
    apart = x.stride(0)
    return x.stride(1) == 1 and apart >= x.shape[1] and (x.data_ptr() | apart * x.element_size()) % 16 == 0


def head_of(head: LMHead, bias_C: Tensor | None) -> Head:
    """Return what kernels know of `head`; `bias_C`: of the columns at hand, contiguous, in the products' dtype."""
    return Head(bias_C, float(head.logit_scale), None if head.softcap is None else float(head.softcap))


def fused_stats(
    traits: Traits, policy: Operands, reference: Operands, labels_R: Tensor, col: int,
    states: Tensor, label_logits: Tensor, kept: Tensor | None,
) -> Launch:  # fmt: skip
    """Fill `states` ``(parts, STATE (+ EXTRAS), R)``, contiguous, `label_logits` ``(2, R)`` of labels that are here,
    and `kept` ``(2, R, C)`` if given, with both products."""
    from ..device.stats import fused_stats as kernel

    config = traits.config("fused_stats")
    operands = _operands(policy, reference, config)
    parts = _blocks(operands["V"], config.C)
    if parts != states.shape[0]:
        raise ValueError(f"fused_stats: {config} makes {parts} parts of {operands['V']} columns, not {states.shape[0]}")
    if traits.case.one_head:
        operands["u"] = None
    flags = dict(PRECISION=precision(policy.hidden.dtype), EXTRAS=traits.case.extras)
    kernel[_blocks(operands["T"], config.R), parts](
        **operands, labels=labels_R, col=col, states=states, label_logits=label_logits, kept=kept,
        stride_labels=label_logits.stride(0), stride_kept=0 if kept is None else kept.stride(1),
        plane=0 if kept is None else kept.stride(0), R=config.R, C=config.C, K=config.K, **flags, **config.options,
    )  # fmt: skip
    flags["one_head"], flags["kept"] = traits.case.one_head, kept is not None
    return _launched("fused_stats", config, flags, policy, reference)


def fused_dz(
    traits: Traits, policy: Operands, reference: Operands, labels_R: Tensor, col: int, row_values: Tensor, dz: Tensor
) -> Launch:
    """Fill dz ``(R, C)`` from the operands and `row_values` ``(ROWS, R)``, a view of rows with one stride."""
    from ..device.dlogits import fused_dz as kernel

    config = traits.config("fused_dz")
    operands, flags = _operands(policy, reference, config), dict(PRECISION=precision(policy.hidden.dtype))
    kernel[_blocks(operands["T"], config.R), _blocks(operands["V"], config.C)](
        **operands, labels=labels_R, col=col, row_values=row_values, dz=dz,
        stride_rows=row_values.stride(0), stride_dz=dz.stride(0), R=config.R, C=config.C, K=config.K, **flags,
        **config.options,
    )  # fmt: skip
    return _launched("fused_dz", config, flags, policy, reference, dz)


def tile_stats(
    traits: Traits, tiles: Sequence[Tensor], heads: Sequence[Head], labels_R: Tensor, col: int,
    states: Tensor, label_logits: Tensor,
) -> Launch:  # fmt: skip
    """Fill `states` ``(1, STATE (+ EXTRAS), R)``, contiguous, and `label_logits` from both models' products ``(R, C)``,
    fp32 and of one stride."""
    from ..device.rows import tile_stats as kernel

    z, r = tiles
    (T, V), config = z.shape, traits.config("tile_stats", z.shape[1])
    flags = dict(EXTRAS=traits.case.extras)
    kernel[(_blocks(T, config.R),)](
        z_tile=z, r_tile=r, head=heads[0], ref_head=heads[1], labels=labels_R, states=states,
        label_logits=label_logits, T=T, V=V, col=col, stride=z.stride(0), stride_labels=label_logits.stride(0),
        R=config.R, C=config.C, **flags, **config.options,
    )  # fmt: skip
    return _launched("tile_stats", config, flags, *heads, z)


def tile_dz(
    traits: Traits, tiles: Sequence[Tensor | None], heads: Sequence[Head], labels_R: Tensor, col: int,
    row_values: Tensor, dz: Tensor,
) -> Launch:  # fmt: skip
    """Fill dz ``(R, C)`` from products ``(R, C)`` and `row_values` ``(ROWS, R)``. None stands for the products that no
    row needs; the policy's are needed where it has a softcap."""
    from ..device.rows import tile_dz as kernel

    z, r = tiles
    (T, V), config = dz.shape, traits.config("tile_dz", dz.shape[1])
    kernel[(_blocks(T, config.R),)](
        z_tile=z, r_tile=r, head=heads[0], ref_head=heads[1], labels=labels_R, row_values=row_values, dz=dz,
        T=T, V=V, col=col, stride=(r if z is None else z).stride(0), stride_rows=row_values.stride(0),
        stride_dz=dz.stride(0), R=config.R, C=config.C, **config.options,
    )  # fmt: skip
    return _launched("tile_dz", config, dict(z=z is not None, r=r is not None), *heads, r if z is None else z, dz)


def _blocks(length: int, step: int) -> int:
    return -(-length // step)


def _operands(policy: Operands, reference: Operands, config: TileConfig) -> dict[str, Any]:
    """Return what the kernels that multiply know of both models, by the names that it has there."""
    shared = dict(
        T=policy.hidden.shape[0], V=policy.weight.shape[0], D=policy.hidden.shape[1], E=reference.hidden.shape[1],
        head=policy.head, ref_head=reference.head,
    )  # fmt: skip
    matrices = dict(h=policy.hidden, w=policy.weight, g=reference.hidden, u=reference.weight)
    if not config.tma:
        return matrices | shared | dict(strides=Strides(*(x.stride(0) for x in matrices.values())))
    from triton.tools.tensor_descriptor import TensorDescriptor

    boxes = dict(h=config.R, w=config.C, g=config.R, u=config.C)
    described = {name: TensorDescriptor.from_tensor(x, [boxes[name], config.K]) for name, x in matrices.items()}
    return described | shared | dict(strides=Strides(None, None, None, None))


def _launched(kernel: str, config: TileConfig, flags: dict[str, Any], *given: Operands | Head | Tensor) -> Launch:
    """Return what was launched; a binary is compiled for the dtype and the alignment of whatever is `given`."""
    heads = [x.head if isinstance(x, Operands) else x for x in given if not isinstance(x, Tensor)]
    tensors = [x for x in given if isinstance(x, Tensor)] + [head.bias for head in heads if head.bias is not None]
    tensors += [x for side in given if isinstance(side, Operands) for x in (side.hidden, side.weight)]
    flags["bias"] = tuple(head.bias is not None for head in heads)
    flags["softcap"] = tuple(head.softcap is not None for head in heads)
    flags["divisible"] = tuple((x.data_ptr() % 16 == 0, x.stride(0) % 16 == 0) for x in tensors)
    return Launch(kernel, config, tuple(x.dtype for x in tensors), tuple(flags.items()), tensors[0].device)
