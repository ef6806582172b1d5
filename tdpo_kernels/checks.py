"""Check a call before any work. Every error names the argument, what was seen and what is wanted."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad

from .loss import DEFAULT_ALPHA, REDUCTIONS, VARIANTS
from .reference import EXTRAS
from .types import LMHead, VocabParallelHead

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def seen(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
    if isinstance(x, int) and x.bit_length() > 64:
        return f"int of {x.bit_length()} bits"
    return f"{type(x).__name__} {x!r}" if isinstance(x, (int, float, str, bool, type(None))) else type(x).__name__


def as_head(head: Tensor | nn.Linear | LMHead, name: str) -> LMHead:
    """Return the head that a ``(V, D)`` tensor, an ``nn.Linear`` or an ``LMHead`` stands for, or raise."""
    if isinstance(head, nn.Linear):
        head = _of_linear(head, name)
    elif isinstance(head, Tensor):
        head = LMHead(head)
    if not isinstance(head, LMHead):
        raise TypeError(f"{name}: got {seen(head)}, wanted a (V, D) tensor, an nn.Linear or an LMHead")
    _tensor(head.weight, f"{name}.weight", FLOATS)
    if head.weight.dim() != 2 or head.vocab == 0:
        raise ValueError(f"{name}.weight: got {seen(head.weight)}, wanted (V, D) with V >= 1")
    if head.bias is not None:
        _tensor(head.bias, f"{name}.bias", (head.weight.dtype,))
        if head.bias.shape != head.weight.shape[:1]:
            raise ValueError(
                f"{name}.bias: got {seen(head.bias)}, wanted ({head.weight.shape[0]},) as {name}.weight has rows"
            )
        _same_device(head.bias, f"{name}.bias", head.weight, f"{name}.weight")
    logit_scale = _number(head.logit_scale, f"{name}.logit_scale")
    softcap = None if head.softcap is None else _number(head.softcap, f"{name}.softcap")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{name}.softcap: got {seen(head.softcap)}, wanted > 0, or None for no cap")
    computed = torch.promote_types(head.weight.dtype, torch.float32)
    if abs(logit_scale) > torch.finfo(computed).max:
        raise ValueError(f"{name}.logit_scale: got {seen(head.logit_scale)}, wanted one that {computed} holds")
    if softcap is not None and not torch.finfo(computed).tiny <= softcap <= torch.finfo(computed).max:
        raise ValueError(f"{name}.softcap: got {seen(head.softcap)}, wanted one that {computed} holds")
    if isinstance(head, VocabParallelHead):
        _check_split(head, name)
    floats = logit_scale is head.logit_scale and softcap is head.softcap
    return head if floats else replace(head, logit_scale=logit_scale, softcap=softcap)


def _check_split(head: VocabParallelHead, name: str) -> None:
    """Raise ValueError for a head that was made by hand, or was given another weight."""
    rank, world = dist.get_rank(head.group), dist.get_world_size(head.group)
    if rank < 0 or len(head.sizes) != world or head.sizes[rank] != head.weight.shape[0]:
        raise ValueError(
            f"{name}.weight: got {seen(head.weight)} on rank {rank} of {world}, wanted the rows that {name}.sizes "
            f"{head.sizes} say; make it by tdpo_kernels.parallel.vocab_parallel"
        )


def _of_linear(linear: nn.Linear, name: str) -> LMHead:
    """Return the head that a linear stands for, or raise TypeError if it does more than its weight and bias say."""
    if isinstance(linear.weight, nn.parameter.UninitializedParameter):
        raise TypeError(f"{name}: got a {seen(linear)} that is not initialised, wanted one with a weight; run it once")
    _tensor(linear.weight, f"{name}.weight", FLOATS)  # first, as a sharded weight has hooks too
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):  # LoRA, quantisation, offloading
        raise TypeError(f"{name}: got a {seen(linear)} with a forward of its own, wanted nn.Linear's, or an LMHead")
    hooks = {
        "forward hooks": linear._forward_hooks, "forward pre-hooks": linear._forward_pre_hooks,
        "backward hooks": linear._backward_hooks, "backward pre-hooks": linear._backward_pre_hooks,
    }  # fmt: skip
    if there := " and ".join(kind for kind, registered in hooks.items() if registered):
        raise TypeError(f"{name}: got a {seen(linear)} with {there}, which would not run; wanted an LMHead")
    return LMHead(linear.weight, linear.bias)


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
        raise ValueError(f"hidden: got {seen(hidden)}, wanted (..., L, D), or (N, D) when packed")
    if hidden.device.type == "meta":
        raise ValueError(f"hidden: got {seen(hidden)}, wanted a device that holds values, not 'meta'")
    for name, x in (("labels", labels), ("ref_hidden", ref_hidden)):
        want = hidden.shape[:-1]
        have = x.shape if name == "labels" else x.shape[:-1]
        if have != want:
            tail = "" if name == "labels" else ", E"
            raise ValueError(
                f"{name}: got {seen(x)}, wanted ({', '.join(map(str, want))}{tail}) to match hidden {seen(hidden)}"
            )
    for name, x in (("hidden", hidden), ("ref_hidden", ref_hidden)):
        if x.shape[-1] == 0:
            raise ValueError(f"{name}: got {seen(x)}, wanted at least one hidden dimension")
    for prefix, x, h in (("", hidden, head), ("ref_", ref_hidden, ref_head)):
        if x.shape[-1] != h.weight.shape[1]:
            raise ValueError(
                f"{prefix}head.weight: got {seen(h.weight)}, wanted (V, {x.shape[-1]}) to match "
                f"{prefix}hidden {seen(x)}"
            )
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
        raise TypeError(
            f"{prefix}head.weight: got {seen(head.weight)}, wanted {str(pair[0]).removeprefix('torch.')} as "
            f"{prefix}hidden {seen(hidden)}; cast one of them, or call under torch.autocast as you would F.linear"
        )
    return pair[0]


def check_cu_seqlens(cu_seqlens: Tensor, hidden: Tensor) -> None:
    """Check shape, dtype and device; `pack` reads the values."""
    _tensor(cu_seqlens, "cu_seqlens", (torch.int32, torch.int64))
    if hidden.dim() != 2:
        raise ValueError(f"hidden: got {seen(hidden)}, wanted packed (N, D) when cu_seqlens is given")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens: got {seen(cu_seqlens)}, wanted (S + 1,) offsets from 0 to N")
    _same_device(cu_seqlens, "cu_seqlens", hidden, "hidden")


def check_pairs(hidden: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        if hidden.dim() != 3:
            raise ValueError(f"hidden: got {seen(hidden)}, wanted (2P, L, D), or (N, D) with cu_seqlens")
        count, name, x = hidden.shape[0], "hidden", hidden
    else:
        count, name, x = cu_seqlens.numel() - 1, "cu_seqlens", cu_seqlens
    if count < 2 or count % 2:
        raise ValueError(
            f"{name}: got {seen(x)}, that is {count} sequences; wanted 2P of them: the P chosen first, then their P "
            "rejected"
        )


def check_loss(beta: float, alpha: float | None, variant: str, reduction: str) -> tuple[float, float]:
    """Return beta and alpha as floats, with alpha's default filled in."""
    for name, value, allowed in (("variant", variant, VARIANTS), ("reduction", reduction, REDUCTIONS)):
        if value not in allowed:
            raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, allowed))}")
    number = _number(beta, "beta")
    if number <= 0:
        raise ValueError(f"beta: got {seen(beta)}, wanted > 0")
    if alpha is None:
        return number, DEFAULT_ALPHA
    if variant == "tdpo1":
        raise ValueError(
            f"alpha: got {seen(alpha)} with variant='tdpo1', which has no alpha; wanted None (leave it out), "
            "or variant='tdpo2'"
        )
    if _number(alpha, "alpha") < 0:
        raise ValueError(f"alpha: got {seen(alpha)}, wanted >= 0")
    return number, float(alpha)


def check_backend(backend: str, known: Iterable[str]) -> None:
    """Check the name only: whether it runs is known once there is a device."""
    names = ("auto", *known)
    if not isinstance(backend, str) or backend not in names:
        raise ValueError(f"backend: got {seen(backend)}, wanted {' or '.join(map(repr, names))}")


def check_options(ignore_index: int | None, shift: bool, extras: tuple[str, ...], memory_budget: int) -> None:
    if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
        raise TypeError(f"ignore_index: got {seen(ignore_index)}, wanted an int, or None when every label counts")
    if ignore_index is not None and not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: got {seen(ignore_index)}, wanted one that int64 labels can hold")
    if not isinstance(shift, bool):
        raise TypeError(f"shift: got {seen(shift)}, wanted True or False")
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int) or memory_budget < 0:
        raise ValueError(f"memory_budget: got {seen(memory_budget)}, wanted a number of bytes >= 0")
    if (
        not isinstance(extras, (tuple, list))
        or len(set(map(repr, extras))) < len(extras)
        or any(x not in EXTRAS for x in extras)
    ):
        raise ValueError(f"extras: got {extras!r}, wanted a tuple of different names from {', '.join(EXTRAS)}")


def check_tensor(x: object, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {seen(x)}, wanted a tensor")


def _tensor(x: object, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    check_tensor(x, name)
    if x.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: got {seen(x)}, wanted {wanted}")
    plain = type(x) in (Tensor, nn.Parameter) or not hasattr(x, "full_tensor")
    if x.layout != torch.strided or not plain:
        raise TypeError(
            f"{name}: got a {type(x).__name__} with layout {x.layout}, wanted a plain dense tensor on one device"
        )


def _number(x: object, name: str) -> float:
    """Return x as a finite float: torch multiplies by no int beyond int64."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name}: got {seen(x)}, wanted a number")
    if abs(x) > sys.float_info.max or x != x:
        raise ValueError(f"{name}: got {seen(x)}, wanted a finite number")
    return float(x)


def _same_device(x: Tensor, name: str, other: Tensor, other_name: str) -> None:
    if x.device != other.device:
        raise ValueError(f"{name}: got {seen(x)}, wanted it on {other.device} as {other_name}")
