"""Check a call before any work. Every error names the argument, what was seen and what is wanted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from numbers import Integral, Real

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad

from .loss import DEFAULT_ALPHA, REDUCTIONS, VARIANTS, Terms
from .reference import EXTRAS
from .types import LMHead, VocabParallelHead

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def seen(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
    if isinstance(x, int) and x.bit_length() > 64:
        return f"int of {x.bit_length()} bits"
    return f"{type(x).__name__} {x!r}" if isinstance(x, (int, float, str, bool, type(None))) else type(x).__name__


def wrong(name: str, x: object, wanted: str, kind: type[Exception] = ValueError) -> Exception:
    """Return the error to raise for an argument x that is not what is wanted."""
    return kind(f"{name}: got {seen(x)}, wanted {wanted}")


def as_head(head: Tensor | nn.Linear | LMHead, name: str) -> LMHead:
    """Return the head that a ``(V, D)`` tensor, an ``nn.Linear`` or an ``LMHead`` stands for, or raise."""
    if isinstance(head, nn.Linear):
        _check_linear(head, name)
    head = head_of(head, name)
    _tensor(head.weight, f"{name}.weight", FLOATS)
    if head.weight.dim() != 2 or head.vocab == 0:
        raise wrong(f"{name}.weight", head.weight, "(V, D) with V >= 1")
    if head.bias is not None:
        _tensor(head.bias, f"{name}.bias", (head.weight.dtype,))
        if head.bias.shape != head.weight.shape[:1]:
            raise wrong(f"{name}.bias", head.bias, f"({head.weight.shape[0]},) as {name}.weight has rows")
        _same_device(head.bias, f"{name}.bias", head.weight, f"{name}.weight")
    if isinstance(head, VocabParallelHead):
        _check_split(head, name)
    computed = torch.promote_types(head.weight.dtype, torch.float32)
    scale = _number(head.logit_scale, f"{name}.logit_scale")
    cap = None if head.softcap is None else _number(head.softcap, f"{name}.softcap")
    if cap is not None and cap <= 0:
        raise wrong(f"{name}.softcap", head.softcap, "> 0, or None for no cap")
    for what, x, least in (("logit_scale", scale, 0.0), ("softcap", cap, torch.finfo(computed).tiny)):
        if x is not None and not least <= abs(x) <= torch.finfo(computed).max:
            raise wrong(f"{name}.{what}", getattr(head, what), f"one that {computed} holds")
    floats = scale is head.logit_scale and cap is head.softcap
    return head if floats else replace(head, logit_scale=scale, softcap=cap)


def head_of(head: Tensor | nn.Linear | LMHead, name: str) -> LMHead:
    """Return the head, unchecked, or raise TypeError: a linear must do what its weight and bias say, and no more."""
    if isinstance(head, nn.Linear):
        if type(head).forward is not nn.Linear.forward or "forward" in vars(head):  # LoRA, quantisation, offloading
            raise TypeError(f"{name}: got a {seen(head)} with a forward of its own, wanted nn.Linear's, or an LMHead")
        return LMHead(head.weight, head.bias)
    head = LMHead(head) if isinstance(head, Tensor) else head
    if not isinstance(head, LMHead):
        raise wrong(name, head, "a (V, D) tensor, an nn.Linear or an LMHead", TypeError)
    return head


def _check_linear(linear: nn.Linear, name: str) -> None:
    """Raise TypeError for a linear without a weight, and for hooks, which would not run."""
    if isinstance(linear.weight, nn.parameter.UninitializedParameter):
        raise TypeError(f"{name}: got a {seen(linear)} that is not initialised, wanted one with a weight; run it once")
    _tensor(linear.weight, f"{name}.weight", FLOATS)  # first, as a sharded weight has hooks too
    kinds = ("forward hooks", "forward pre-hooks", "backward hooks", "backward pre-hooks")
    there = [kind for kind in kinds if getattr(linear, f"_{kind}".replace(" ", "_").replace("-", "_"))]
    if there and type(linear).forward is nn.Linear.forward:  # else that is said
        raise TypeError(
            f"{name}: got a {seen(linear)} with {' and '.join(there)}, which would not run; wanted an LMHead"
        )


def _check_split(head: VocabParallelHead, name: str) -> None:
    """Raise ValueError for a head that was made by hand, or was given another weight."""
    rank, world = dist.get_rank(head.group), dist.get_world_size(head.group)
    if rank < 0 or len(head.sizes) != world or head.sizes[rank] != head.weight.shape[0]:
        raise ValueError(
            f"{name}.weight: got {seen(head.weight)} on rank {rank} of {world}, wanted the rows that {name}.sizes "
            f"{head.sizes} say; make it by tdpo_kernels.parallel.vocab_parallel"
        )


def check_transforms(hidden: object) -> None:
    """Raise TypeError within transforms of torch, whose wrapped tensors no kernel sees through."""
    if torch.compiler.is_compiling():
        return
    level = torch._C._functorch.peek_interpreter_stack()
    found = "" if level is None else _TRANSFORMS.get(level.key().name, "torch.func")
    if not found and isinstance(hidden, Tensor) and forward_ad.unpack_dual(hidden).tangent is not None:
        found = "forward-mode"
    if not found and torch.jit.is_tracing():
        found = "torch.jit.trace"
    if found:
        raise TypeError(f"hidden: got a tensor inside {found}, wanted a plain call; only reverse-mode torch.autograd "
                        "and torch.compile go through it")  # fmt: skip


_TRANSFORMS = {"Vmap": "torch.func.vmap", "Grad": "torch.func.grad", "Jvp": "forward-mode torch.func.jvp"}


def check_inputs(hidden: Tensor, head: LMHead, ref_hidden: Tensor, ref_head: LMHead, labels: Tensor) -> None:
    """Check shapes, dtypes and devices of one call; read no value."""
    _tensor(hidden, "hidden", FLOATS)
    _tensor(ref_hidden, "ref_hidden", FLOATS)
    _tensor(labels, "labels", (torch.int64, torch.int32))
    if hidden.dim() < 2:
        raise wrong("hidden", hidden, "(..., L, D), or (N, D) when packed")
    if hidden.device.type == "meta":
        raise wrong("hidden", hidden, "a device that holds values, not 'meta'")
    for name, x, have, tail in (
        ("labels", labels, labels.shape, ""), ("ref_hidden", ref_hidden, ref_hidden.shape[:-1], ", E"),
    ):  # fmt: skip
        if have != hidden.shape[:-1]:
            want = ", ".join(map(str, hidden.shape[:-1]))
            raise wrong(name, x, f"({want}{tail}) to match hidden {seen(hidden)}")
    for name, x in (("hidden", hidden), ("ref_hidden", ref_hidden)):
        if x.shape[-1] == 0:
            raise wrong(name, x, "at least one hidden dimension")
    for prefix, x, h in (("", hidden, head), ("ref_", ref_hidden, ref_head)):
        if x.shape[-1] != h.weight.shape[1]:
            raise wrong(f"{prefix}head.weight", h.weight, f"(V, {x.shape[-1]}) to match {prefix}hidden {seen(x)}")
        _same_device(x, f"{prefix}hidden", hidden, "hidden")
        _same_device(h.weight, f"{prefix}head.weight", hidden, "hidden")
    _same_device(labels, "labels", hidden, "hidden")
    if head.vocab != ref_head.vocab:
        raise ValueError(
            f"ref_head.weight: got {seen(ref_head.weight)}, V = {ref_head.vocab}; wanted V = {head.vocab} as "
            f"head.weight {seen(head.weight)}; the KL needs one vocabulary, so slice padded rows off the longer head"
        )
    if isinstance(ref_head, VocabParallelHead):
        _check_groups(head, ref_head)


def _check_groups(head: LMHead, ref_head: VocabParallelHead) -> None:
    """Raise ValueError unless both heads are split over the same ranks."""
    if not isinstance(head, VocabParallelHead):
        raise ValueError("head: got a whole head with a vocabulary-parallel ref_head, wanted it split as well")
    ranks, ref_ranks = (dist.get_process_group_ranks(h.group) for h in (head, ref_head))
    if ranks != ref_ranks:
        raise ValueError(f"ref_head: got a head split over ranks {ref_ranks}, wanted head's {ranks}, in that order")


def compute_dtype(hidden: Tensor, head: LMHead, prefix: str) -> torch.dtype:
    """Return the dtype that `F.linear` would multiply in: the common one, or autocast's."""
    device = hidden.device.type
    pair = (hidden.dtype, head.weight.dtype)
    if torch.is_autocast_enabled(device) and torch.float64 not in pair:
        return torch.get_autocast_dtype(device)
    if pair[0] != pair[1]:
        as_hidden = f"{str(pair[0]).removeprefix('torch.')} as {prefix}hidden {seen(hidden)}"
        how = "cast one of them, or call under torch.autocast as you would F.linear"
        raise wrong(f"{prefix}head.weight", head.weight, f"{as_hidden}; {how}", TypeError)
    return pair[0]


def check_cu_seqlens(cu_seqlens: Tensor, hidden: Tensor) -> None:
    """Check shape, dtype and device; `pack` reads the values."""
    _tensor(cu_seqlens, "cu_seqlens", (torch.int32, torch.int64))
    if hidden.dim() != 2:
        raise wrong("hidden", hidden, "packed (N, D) when cu_seqlens is given")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise wrong("cu_seqlens", cu_seqlens, "(S + 1,) offsets from 0 to N")
    _same_device(cu_seqlens, "cu_seqlens", hidden, "hidden")


def check_pairs(hidden: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        if hidden.dim() != 3:
            raise wrong("hidden", hidden, "(2P, L, D), or (N, D) with cu_seqlens")
        count, name, x = hidden.shape[0], "hidden", hidden
    else:
        count, name, x = cu_seqlens.numel() - 1, "cu_seqlens", cu_seqlens
    if count < 2 or count % 2:
        raise ValueError(
            f"{name}: got {seen(x)}, that is {count} sequences; wanted 2P of them: the P chosen first, then their P "
            "rejected"
        )


def check_loss(
    beta: float, alpha: float | None, variant: str, reduction: str, sft_weight: float = 0.0, normalized: bool = False
) -> Terms:  # fmt: skip
    """Return the terms of the loss, with alpha's default filled in."""
    for name, value, allowed in (("variant", variant, VARIANTS), ("reduction", reduction, REDUCTIONS)):
        if value not in allowed:
            raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, allowed))}")
    number = _number(beta, "beta")
    if number <= 0:
        raise wrong("beta", beta, "> 0")
    if not isinstance(normalized, bool):
        raise wrong("length_normalized", normalized, "True or False", TypeError)
    weight = _number(sft_weight, "sft_weight")
    if weight < 0:
        raise wrong("sft_weight", sft_weight, ">= 0")
    if alpha is None:
        return Terms(number, DEFAULT_ALPHA, variant, weight, normalized)
    if variant == "tdpo1":
        raise ValueError(
            f"alpha: got {seen(alpha)} with variant='tdpo1', which has no alpha; wanted None (leave it out), "
            "or variant='tdpo2'"
        )
    if _number(alpha, "alpha") < 0:
        raise wrong("alpha", alpha, ">= 0")
    return Terms(number, float(alpha), variant, weight, normalized)


def check_backend(backend: str, known: Iterable[str]) -> None:
    """Check the name only: whether it runs is known once there is a device."""
    names = ("auto", *known)
    if not isinstance(backend, str) or backend not in names:
        raise wrong("backend", backend, " or ".join(map(repr, names)))


def check_options(ignore_index: int | None, shift: bool, extras: tuple[str, ...], memory_budget: int) -> None:
    if ignore_index is not None and not is_int(ignore_index):
        raise wrong("ignore_index", ignore_index, "an int, or None when every label counts", TypeError)
    if ignore_index is not None and not -(2**63) <= ignore_index < 2**63:
        raise wrong("ignore_index", ignore_index, "one that int64 labels can hold")
    if not isinstance(shift, bool):
        raise wrong("shift", shift, "True or False", TypeError)
    if not is_int(memory_budget) or memory_budget < 0:
        raise wrong("memory_budget", memory_budget, "a number of bytes >= 0")
    known = isinstance(extras, (tuple, list)) and all(x in EXTRAS for x in extras)
    if not known or len(set(extras)) < len(extras):
        raise ValueError(f"extras: got {extras!r}, wanted a tuple of different names from {', '.join(EXTRAS)}")


def check_tensor(x: object, name: str) -> None:
    if not isinstance(x, Tensor):
        raise wrong(name, x, "a tensor", TypeError)


def is_int(x: object) -> bool:
    """Return whether x is a whole number, of Python or numpy, and no bool."""
    return isinstance(x, Integral) and not isinstance(x, bool)


def _tensor(x: object, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    check_tensor(x, name)
    if x.dtype not in dtypes:
        raise wrong(name, x, " or ".join(str(d).removeprefix("torch.") for d in dtypes), TypeError)
    plain = type(x) in (Tensor, nn.Parameter) or not hasattr(x, "full_tensor")
    if x.layout != torch.strided or not plain:
        raise TypeError(
            f"{name}: got a {type(x).__name__} with layout {x.layout}, wanted a plain dense tensor on one device"
        )


def _number(x: object, name: str) -> float:
    """Return x as a finite float: torch multiplies by no int beyond int64."""
    if isinstance(x, bool) or not isinstance(x, Real):
        raise wrong(name, x, "a number", TypeError)
    try:
        number = float(x)
    except OverflowError:
        number = math.inf
    if not abs(number) < math.inf:  # a graph's symbols know no isfinite
        raise wrong(name, x, "a finite number")
    return number


def _same_device(x: Tensor, name: str, other: Tensor, other_name: str) -> None:
    if x.device != other.device:
        raise wrong(name, x, f"it on {other.device} as {other_name}")
