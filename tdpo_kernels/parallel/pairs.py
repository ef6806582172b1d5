"""Data parallelism: the mean over all ranks' pairs, where ranks have different numbers of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from ..checks import check_tensor, seen
from ..collectives import summed_

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def mean_over_ranks(loss_P: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """This rank's share of the mean over the pairs of all ranks, from ``fused_tdpo_loss(..., reduction="none").loss``.

    Scaled so that what averages gradients over the ranks (DDP, FSDP) makes the gradient of that mean, and so that the
    average of what ranks log is that mean; a mean of each rank's own would give pairs of smaller shares more weight.
    One all-reduce of a number; a rank without pairs takes part.

    Raises:
        ValueError: `loss_P` is not one loss per pair.
    """
    check_tensor(loss_P, "loss_P")
    if loss_P.dim() != 1:
        raise ValueError(f"loss_P: got {seen(loss_P)}, wanted (P,): one loss per pair, of reduction='none'")
    group = dist.group.WORLD if group is None else group
    count = summed_(loss_P.new_tensor(len(loss_P), dtype=loss_P.dtype), group)
    return loss_P.sum() * (dist.get_world_size(group) / count.clamp(min=1))
