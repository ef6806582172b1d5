"""Exchange tensors and facts between ranks, and name the exchange that failed when one of them does not answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return the x of every rank, ``(W, *x.shape)``, in rank order."""
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    if x.numel() == 0:
        return out
    with _named(f"all-gather of {_shape(x)}", group):
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until torch 2.13
        gather(out.view(-1), x.contiguous().view(-1), group=group)
    return out


def summed_(x: Tensor, group: ProcessGroup) -> Tensor:
    """Return x, summed over the ranks in place."""
    with _named(f"all-reduce of {_shape(x)}", group):
        dist.all_reduce(x, group=group)
    return x


def exchanged(x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    """Send ``sent[k]`` rows of x to each rank k, in order, and return the ``received[k]`` rows that each has sent."""
    out = x.new_empty(sum(received), *x.shape[1:])
    with _named(f"all-to-all of {_shape(x)}", group):
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


@contextmanager
def _named(what: str, group: ProcessGroup) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"tdpo_kernels: {what} over ranks {dist.get_process_group_ranks(group)} failed on rank {dist.get_rank()}; "
            f"has one of them died, or not made this call? The backend says: {error}"
        ) from error


def _shape(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def told(facts: tuple[object, ...], group: ProcessGroup) -> list[tuple[object, ...]]:
    """Return every rank's facts, in rank order. This is slow, and meant for facts that are told once."""
    every: list[Any] = [None] * dist.get_world_size(group)
    with _named(f"all-gather of {facts}", group):
        dist.all_gather_object(every, facts, group=group)
    return every


def same(every: Sequence[Sequence[object]], names: tuple[str, ...]) -> None:
    """Raise ValueError, on every rank alike, naming the first fact in which the ranks differ."""
    for name, seen in zip(names, zip(*every, strict=True), strict=True):
        if len(set(seen)) > 1:
            raise ValueError(f"{name}: the ranks of the head's group have {', '.join(map(str, seen))}, wanted the same")
