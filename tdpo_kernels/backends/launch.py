"""Host side of the device code: what runs where, pointers or descriptors, grids; one function per kernel.

Operands are blocks already cut to the rows and columns at hand; labels count from the first of those columns.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from ..tuning import Device, TileConfig, choose
from ..tuning.heuristic import family_of
from ..types import Inputs, LMHead
from .slab import Operand, Side
from .tile_math import largest_exponent

STATE, ROWS = 12, 12  # `device.stats` and `device.merge`
MERGE_ROWS = 32
INTERPRETED = Device("interpreter", "interpreter")


@dataclass(frozen=True)
class Launch:
    """What tells one compiled kernel from another. `flags`: names and values of the constexprs but the tile's."""

    kernel: str
    config: TileConfig
    dtypes: tuple[torch.dtype, ...]
    flags: tuple[tuple[str, Any], ...]
    device: torch.device

    def __str__(self) -> str:
        flags = " ".join(f"{name}={value}" for name, value in self.flags)
        dtypes = ", ".join(str(x).removeprefix("torch.") for x in self.dtypes)
        return f"{self.kernel} with {self.config!r}, {dtypes}, {flags or 'no flags'}, on {self.device}"


@cache
def unavailable(device: torch.device) -> str:
    """Why no kernel runs on `device`; empty if they do. Settled at the first call, as Triton does at its import."""
    if not _installed():
        return "triton is not installed"
    if device.type == "cuda":
        return _no_configuration(device)
    if os.environ.get("TRITON_INTERPRET") and _interpreting():
        return "" if device.type == "cpu" else f"the interpreter runs on a CPU, not on {device.type}"
    return f"Triton has no compiler for {device.type}; TRITON_INTERPRET=1 runs the kernels on a CPU, slowly, for tests"


@cache
def _no_configuration(device: torch.device) -> str:
    try:
        family_of(device_of(device).arch)
    except ValueError as error:
        return str(error)
    return ""


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    import triton

    return triton.knobs.runtime.interpret


@lru_cache
def device_of(device: torch.device) -> Device:
    """What the choice of a configuration knows of a device."""
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    arch = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return Device(properties.name, arch)


@dataclass(frozen=True, eq=False)
class Operands:
    """One model's share of a tile: hidden states ``(R, D)``, weight rows ``(C, D)``, and its head's bias ``(C,)``."""

    hidden: Tensor
    weight: Tensor
    head: LMHead
    bias: Tensor | None


def precision(dtype: torch.dtype) -> str:
    """How fp32 is multiplied: as torch is told to. Others have only one way."""
    return "tf32" if dtype == torch.float32 and tf32_is_allowed() and not torch.version.hip else "ieee"


def tf32_is_allowed() -> bool:
    """Whichever way it was said: the older getter raises once the newer setting was used."""
    said = torch.backends.cuda.matmul.fp32_precision
    return (torch.backends.fp32_precision if said == "none" else said) == "tf32"


def _flags(head: LMHead, bias: Tensor | None, ref_head: LMHead, ref_bias: Tensor | None) -> dict[str, bool]:
    return dict(
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=head.softcap is not None,
        HAS_REF_BIAS=ref_bias is not None,
        HAS_REF_SOFTCAP=ref_head.softcap is not None,
    )


def _scalars(head: LMHead, ref_head: LMHead) -> dict[str, float]:
    return dict(
        scale=head.logit_scale, softcap=head.softcap or 1.0,
        ref_scale=ref_head.logit_scale, ref_softcap=ref_head.softcap or 1.0,
    )  # fmt: skip


@dataclass(frozen=True)
class Traits:
    """What the configurations of one call depend on; never the number of rows."""

    device: Device
    itemsize: int
    width: int
    one_head: bool  # one load of the weight serves both products
    bias: bool
    softcap: bool
    extras: bool
    ieee: bool
    aligned: bool
    lies: tuple[bool, ...]  # `_lies` of both models' hidden states and weights

    def config(self, kernel: str, staged: bool = False) -> TileConfig:
        return choose(
            kernel, self.device, self.itemsize, width=self.width, staged=staged, one_head=self.one_head, bias=self.bias,
            softcap=self.softcap, extras=self.extras, ieee=self.ieee, aligned=self.aligned,
        )  # fmt: skip

    def row_config(self, kernel: str, columns: int, staged: bool = False) -> TileConfig:
        """Of a kernel that takes fp32 tiles of so many columns from memory."""
        return choose(
            kernel, self.device, 4, width=self.width, columns=columns, staged=staged, extras=self.extras,
            bias=self.bias, softcap=self.softcap,
        )  # fmt: skip


def traits_of(inputs: Inputs, sides: tuple[Side, Side]) -> Traits:
    policy, reference = (side.model for side in sides)
    heads = policy.head, reference.head
    w, u = policy.head.weight, reference.head.weight
    one_head = w.data_ptr() == u.data_ptr() and (w.shape, w.stride(), w.dtype) == (u.shape, u.stride(), u.dtype)
    return Traits(
        device=device_of(policy.hidden.device),
        itemsize=max(policy.dtype.itemsize, reference.dtype.itemsize),
        width=w.shape[1],
        one_head=one_head and policy.dtype == reference.dtype,
        bias=any(head.bias is not None for head in heads),
        softcap=any(head.softcap is not None for head in heads),
        extras=bool(inputs.extras),
        ieee=precision(policy.dtype) == "ieee",
        aligned=all(_aligned(x) for side in sides for x in (side.hidden, side.weight)),
        lies=tuple(lie for side in sides for x in (side.hidden, side.weight) for lie in _lies(x)),
    )


def _aligned(x: Operand) -> bool:
    """What TMA asks of a matrix: base and row stride in multiples of 16 bytes, rows apart. Copies are packed."""
    if x.needs_copy() or x.source.stride(1) != 1:
        return x.source.shape[1] * x.compute.itemsize % 16 == 0
    apart = x.source.stride(0)
    return apart >= x.source.shape[1] and (x.source.data_ptr() | apart * x.source.itemsize) % 16 == 0


def _lies(x: Operand) -> tuple[bool, bool]:
    """Whether base and row stride of what a kernel is given are multiples of 16, in bytes and in elements: a binary is
    compiled for that, whatever its configuration."""
    if x.needs_copy() or x.source.stride(1) != 1:
        return True, x.source.shape[1] % 16 == 0
    return x.source.data_ptr() % 16 == 0, x.source.stride(0) % 16 == 0


def bias_block(side: Side, cols: slice) -> Tensor | None:
    bias = side.model.head.bias
    return None if bias is None else bias[cols].to(side.model.dtype).contiguous()


def _blocks(length: int, step: int) -> int:
    return -(-length // step)


def _programs(device: torch.device, config: TileConfig, T: int, V: int) -> tuple[int, ...]:
    """The grid of a kernel that multiplies. One that is persistent has as many programs as the device holds of them,
    if each takes all the registers that a thread can have, which the tiles that are worth it do."""
    tiles = _blocks(T, config.R), _blocks(V, config.C)
    if not config.persistent:
        return tiles
    return (min(tiles[0] * tiles[1], _multiprocessors(device) * max(8 // config.warps, 1)),)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _matrix(x: Tensor, rows: int, config: TileConfig):
    """x as the kernel loads it."""
    if not config.tma:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [rows, config.K])


def _matrices(policy: Operands, reference: Operands, config: TileConfig) -> dict:
    """The operands by their names in the kernel."""
    pairs = dict(h=policy.hidden, w=policy.weight, g=reference.hidden, u=reference.weight)
    rows = dict(h=config.R, w=config.C, g=config.R, u=config.C)
    return {name: _matrix(x, rows[name], config) for name, x in pairs.items()}


def _shapes(policy: Operands, reference: Operands) -> dict:
    return dict(
        T=policy.hidden.shape[0], V=policy.weight.shape[0], D=policy.hidden.shape[1], E=reference.hidden.shape[1],
        first_col=0, last_col=policy.weight.shape[0], bias=policy.bias, ref_bias=reference.bias,
        stride_h=policy.hidden.stride(0), stride_w=policy.weight.stride(0),
        stride_g=reference.hidden.stride(0), stride_u=reference.weight.stride(0),
        **_scalars(policy.head, reference.head),
    )  # fmt: skip


def fused_stats(
    traits: Traits, policy: Operands, reference: Operands, labels_R: Tensor, states: Tensor, staged: Tensor | None
) -> Launch:
    """Fills `states` ``(parts, STATE, R)``, and `staged` ``(planes, R, C)`` if given."""
    from ..device.stats import fused_stats as kernel

    config = traits.config("fused_stats", staged is not None)
    shapes = _shapes(policy, reference)
    parts = _blocks(shapes["V"], config.C)
    if parts != states.shape[0]:
        raise ValueError(f"fused_stats: {config} makes {parts} parts of {shapes['V']} columns, not {states.shape[0]}")
    flags = dict(
        TMA=config.tma, PRECISION=precision(policy.hidden.dtype), ONE_HEAD=traits.one_head, STAGE=staged is not None,
        EXTRAS=traits.extras, **_flags(policy.head, policy.bias, reference.head, reference.bias),
    )  # fmt: skip
    kernel[_programs(policy.hidden.device, config, shapes["T"], shapes["V"])](
        **_matrices(policy, reference, config), **shapes, labels=labels_R, states=states, staged=staged,
        stride_p=0 if staged is None else staged.stride(1), plane=0 if staged is None else staged.stride(0),
        F=largest_exponent(torch.float32), R=config.R, C=config.C, K=config.K, PERSISTENT=config.persistent, **flags,
        **config.options,
    )  # fmt: skip
    return _launched("fused_stats", config, flags | dict(lies=traits.lies), policy.hidden, reference.hidden, staged)


def fused_dz(
    traits: Traits,
    policy: Operands,
    reference: Operands,
    labels_R: Tensor,
    row_values: Tensor,
    coefficients: Tensor,
    dz: Tensor,
) -> Launch:
    """Fills dz ``(R, C)``; row_values and coefficients are ``(.., R)`` views of rows with one stride."""
    from ..device.dlogits import fused_dz as kernel

    config = traits.config("fused_dz")
    shapes = _shapes(policy, reference)
    flags = dict(
        TMA=config.tma, PRECISION=precision(policy.hidden.dtype),
        **_flags(policy.head, policy.bias, reference.head, reference.bias),
    )  # fmt: skip
    kernel[_programs(policy.hidden.device, config, shapes["T"], shapes["V"])](
        **_matrices(policy, reference, config), **shapes, labels=labels_R, row_values=row_values,
        coefficients=coefficients, dz=dz, stride_rows=row_values.stride(0), stride_dz=dz.stride(0),
        R=config.R, C=config.C, K=config.K, PERSISTENT=config.persistent, **flags, **config.options,
    )  # fmt: skip
    return _launched("fused_dz", config, flags | dict(lies=traits.lies), policy.hidden, reference.hidden, dz)


def staged_dz(
    traits: Traits, staged: Tensor, weights: Tensor, part: int, labels_R: Tensor, coefficients: Tensor, dz: Tensor
) -> Launch:
    """The same from planes ``(planes, R, C)`` staged in parts of `part` columns; weights ``(parts, 3, R)``."""
    from ..device.dlogits import staged_dz as kernel

    flags = dict(HAS_SOFTCAP=staged.shape[0] == 3)
    config = choose(
        "staged_dz",
        traits.device,
        staged.dtype.itemsize,
        width=traits.width,
        columns=min(part, 1024),
        softcap=flags["HAS_SOFTCAP"],
    )
    each = _blocks(part, config.C)
    kernel[_blocks(dz.shape[0], config.R), weights.shape[0] * each](
        staged=staged, weights=weights, labels=labels_R, coefficients=coefficients, dz=dz,
        T=dz.shape[0], first_col=0, last_col=dz.shape[1], stride_p=staged.stride(1), plane=staged.stride(0),
        stride_rows=coefficients.stride(0), stride_dz=dz.stride(0), part=part, R=config.R, C=config.C, **flags,
        **config.options,
    )  # fmt: skip
    staged_by = dict(part=part, one_head=traits.one_head, bias=traits.bias, aligned=traits.aligned)
    return _launched("staged_dz", config, flags | staged_by, staged, dz)


def merge_states(states: Tensor, out: Tensor, weights: Tensor | None, extras: bool) -> Launch:
    """`states` ``(parts, STATE, R)`` into `out` ``(ROWS, R)``; `weights` ``(staged, 3, R)`` of the first parts."""
    from ..device.merge import merge_states as kernel

    T, config, flags = states.shape[2], TileConfig(MERGE_ROWS, warps=1), dict(EXTRAS=extras)
    kernel[(_blocks(T, MERGE_ROWS),)](
        states=states, out=out, weights=states if weights is None else weights, T=T, parts=states.shape[0],
        staged_parts=0 if weights is None else weights.shape[0], stride_out=out.stride(0),
        stride_weights=0 if weights is None else weights.stride(1), R=MERGE_ROWS, **flags, **config.options,
    )  # fmt: skip
    return _launched("merge_states", config, flags, states, weights)


def tile_stats(
    traits: Traits,
    tiles: list[Tensor],
    heads: list[LMHead],
    biases: list[Tensor | None],
    labels_R: Tensor,
    states: Tensor,
    staged: Tensor | None,
) -> Launch:
    """Fills `states` ``(1, STATE, R)``, and `staged` ``(planes, R, C)`` if given, from products ``(R, C)``."""
    from ..device.rows import tile_stats as kernel

    (z, r), (T, V) = tiles, tiles[0].shape
    config = traits.row_config("tile_stats", V, staged is not None)
    flags = dict(STAGE=staged is not None, EXTRAS=traits.extras, **_flags(heads[0], biases[0], heads[1], biases[1]))
    kernel[(_blocks(T, config.R),)](
        z_tile=z, r_tile=r, bias=biases[0], ref_bias=biases[1], labels=labels_R, states=states, staged=staged,
        T=T, V=V, first_col=0, last_col=V, stride=z.stride(0), stride_p=0 if staged is None else staged.stride(1),
        plane=0 if staged is None else staged.stride(0), **_scalars(*heads), F=largest_exponent(torch.float32),
        R=config.R, C=config.C, **flags, **config.options,
    )  # fmt: skip
    return _launched("tile_stats", config, flags, z, staged, *biases)


def tile_dz(
    traits: Traits,
    tiles: list[Tensor | None],
    heads: list[LMHead],
    biases: list[Tensor | None],
    labels_R: Tensor,
    row_values: Tensor,
    coefficients: Tensor,
    dz: Tensor,
) -> Launch:
    """Fills dz ``(R, C)`` from the products that are needed; None stands for those that are not."""
    from ..device.rows import tile_dz as kernel

    (z, r), (T, V) = tiles, dz.shape
    some = r if z is None else z
    config = traits.row_config("tile_dz", V)
    flags = dict(
        NEEDS_Z=z is not None, NEEDS_R=r is not None, **_flags(heads[0], biases[0], heads[1], biases[1])
    )  # fmt: skip
    kernel[(_blocks(T, config.R),)](
        z_tile=z, r_tile=r, bias=biases[0], ref_bias=biases[1], labels=labels_R, row_values=row_values,
        coefficients=coefficients, dz=dz, T=T, V=V, first_col=0, last_col=V, stride=some.stride(0),
        stride_rows=row_values.stride(0), stride_dz=dz.stride(0), **_scalars(*heads),
        R=config.R, C=config.C, **flags, **config.options,
    )  # fmt: skip
    return _launched("tile_dz", config, flags, some, dz, *biases)


def _launched(kernel: str, config: TileConfig, flags: dict[str, Any], *tensors: Tensor | None) -> Launch:
    dtypes = tuple(x.dtype for x in tensors if x is not None)
    return Launch(kernel, config, dtypes, tuple(flags.items()), tensors[0].device)
