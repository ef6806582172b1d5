"""Average over all ranks' pairs (data parallelism), where ranks have different numbers of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from ..checks import check_tensor, wrong
from ..collectives import summed_

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def mean_over_ranks(loss_P: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Return this rank's share of the mean over all ranks' pairs, from ``fused_tdpo_loss(..., reduction="none").loss``.

    It is scaled so that averaging gradients over the ranks (DDP, FSDP) makes the gradient of that mean, and averaging
    the ranks' logs the mean itself. A mean over each rank's own pairs would give pairs on ranks with few more weight.
    It takes one all-reduce of a number, in which a rank without pairs must take part.

    Raises:
        ValueError: if `loss_P` is not one loss per pair.
    """
    check_tensor(loss_P, "loss_P")
    if loss_P.dim() != 1:
        raise wrong("loss_P", loss_P, "(P,): one loss per pair, of reduction='none'")
    group = dist.group.WORLD if group is None else group
    count = summed_(loss_P.new_tensor(len(loss_P), dtype=loss_P.dtype), group)
    return loss_P.sum() * (dist.get_world_size(group) / count.clamp(min=1))
