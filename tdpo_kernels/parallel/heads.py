"""Make heads whose vocabulary is split over ranks: tensor parallelism of the LM head."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import check_tensor, head_of, is_int, wrong
from ..collectives import same, told
from ..types import LMHead, VocabParallelHead

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def vocab_parallel(
    head: Tensor | nn.Linear | LMHead, group: ProcessGroup | None = None, *, vocab_size: int | None = None
) -> VocabParallelHead:
    """Return one rank's rows of an LM head, for `fused_tdpo_loss` and `token_stats` in place of the whole head.

    All ranks of the group hand over the same hidden states and labels, and get the same statistics: forward gathers 32
    bytes a token (fp32) from each rank, backward sums dh, ``4 D`` bytes a token, over the ranks. The reference's head
    may be split likewise, split in other places (its rows are then exchanged on every call), or be whole on every rank.
    Given plain tensors, ranks tell each other how many rows they have: make the head once, not in every step.

    Args:
        head: a weight that is a DTensor, ``Shard(0)`` on a mesh of one dimension (as torch's tensor parallelism leaves
            an LM head); or this rank's rows ``(V_k, D)``, in rank order; some ranks may have none. Gradients flow to
            the tensors given.
        group: the ranks. None: the DTensor's mesh, or all ranks.
        vocab_size: V, if the last rows are padding, as in weights padded to a multiple of the ranks. None: all rows
            are part of the vocabulary.

    Raises:
        TypeError, ValueError: if the head is wrong; on all ranks, if the ranks do not fit together.
    """
    if torch.compiler.is_compiling():  # what ranks tell each other is no part of a graph
        return torch.compiler.disable(_made)(head, group, vocab_size)
    return _made(head, group, vocab_size)


def _made(head: Tensor | nn.Linear | LMHead, group: ProcessGroup | None, vocab_size: int | None) -> VocabParallelHead:
    if isinstance(head, VocabParallelHead):
        raise wrong("head", head, "a (V, D) tensor, an nn.Linear or an LMHead", TypeError)
    head = head_of(head, "head")  # hooks do not matter here: torch's tensor parallelism works by them
    for name, x in (("head.weight", head.weight), ("head.bias", head.bias)):
        if x is not None:
            check_tensor(x, name)
    if hasattr(head.weight, "device_mesh"):
        weight, group, sizes = _local(head.weight, "head.weight", group)
        bias = None if head.bias is None else _local(head.bias, "head.bias", group)[0]
    else:
        weight, bias, group = head.weight, head.bias, _members(group)
        sizes = _sizes(head, group)
    if vocab_size is not None:
        sizes = _without_padding(sizes, vocab_size)
        mine = sizes[group.rank()]
        weight, bias = weight[:mine], None if bias is None else bias[:mine]
    return VocabParallelHead(weight, bias, head.logit_scale, head.softcap, group, sizes)


def _members(group: ProcessGroup | None) -> ProcessGroup:
    group = dist.group.WORLD if group is None else group
    if group is None:
        raise ValueError("group: got None and no process group, wanted one; call torch.distributed's first")
    if not isinstance(group, dist.ProcessGroup):
        raise wrong("group", group, "a process group that this rank is in", TypeError)
    return group


def _local(x: Tensor, name: str, group: ProcessGroup | None) -> tuple[Tensor, ProcessGroup, tuple[int, ...]]:
    """Return a DTensor's rows on this rank, its group, and how many rows each rank has."""
    from torch.distributed.tensor import Shard

    if not hasattr(x, "device_mesh"):
        raise wrong(name, x, "a DTensor as head.weight is", TypeError)
    mesh = x.device_mesh
    if mesh.ndim != 1 or tuple(x.placements) != (Shard(0),):
        raise ValueError(
            f"{name}: got placements {x.placements} on a mesh of shape {tuple(mesh.shape)}, wanted (Shard(dim=0),) on "
            "a mesh of one dimension; under FSDP2 call this where the weight is gathered, in the module's forward"
        )
    if group is not None and dist.get_process_group_ranks(_members(group)) != mesh.mesh.tolist():
        raise ValueError(
            f"group: got ranks {dist.get_process_group_ranks(group)}, wanted {name}'s {mesh.mesh.tolist()}"
        )
    world, rows = mesh.size(), x.shape[0]
    step = -(-rows // world)  # as torch.chunk; a DTensor made of pieces of other sizes shows in the first call
    sizes = tuple(min(step, max(rows - k * step, 0)) for k in range(world))
    return x.to_local(), mesh.get_group(), sizes


def _sizes(head: LMHead, group: ProcessGroup) -> tuple[int, ...]:
    """Return how many rows each rank has, or raise on all ranks if one rank's head is wrong."""
    weight, bias = head.weight, head.bias
    fault, (rows, D) = None, weight.shape if weight.dim() == 2 else (0, 0)
    if weight.dim() != 2:
        fault = wrong("head.weight", weight, "this rank's rows (V_k, D)")
    elif bias is not None and bias.shape != (rows,):
        fault = wrong("head.bias", bias, f"({rows},), one for each of this rank's rows")
    names = ("head.weight: D", "head.weight: dtype", "head.bias: there is one")
    every = told((fault and str(fault), rows, D, str(weight.dtype), bias is not None), group)
    for rank, (theirs, *_) in enumerate(every):
        if theirs is not None:
            raise ValueError(f"{theirs} (rank {rank} of the group)")
    same([facts for _, _, *facts in every], names)
    return tuple(rows for _, rows, *_ in every)


def _without_padding(sizes: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    total = sum(sizes)
    if not is_int(vocab_size) or not 1 <= vocab_size <= total:
        raise wrong("vocab_size", vocab_size, f"an int from 1 to {total}, the rows of all ranks")
    ends = accumulate(sizes)
    return tuple(max(min(size, int(vocab_size) - end + size), 0) for size, end in zip(sizes, ends, strict=True))
