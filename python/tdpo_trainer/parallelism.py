"""Refuse the splits over devices that the trainers cannot serve, and count the processes that share a batch.

Data parallelism is the wrappers' own (`forward`), tensor parallelism the model's own plan (`head.lm_head`).
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn


def check_parallelism(config: Any, *models: nn.Module | None) -> None:
    """Check an accelerator's ``parallelism_config`` and a run's models.

    Raises:
        ValueError: sequences or layers are split over processes, which a loss of whole sequences would not notice.
    """
    for name in ("cp_size", "sp_size"):
        if (size := getattr(config, name, None) or 1) > 1:
            raise ValueError(
                f"parallelism_config.{name}: got {size}, wanted 1: the trainers take whole sequences; for a loop of "
                "your own there is tdpo_kernels.parallel.sequence_parallel_loss"
            )
    for model in models:
        plan = getattr(getattr(model, "config", None), "distributed_config", None)
        if (size := getattr(plan, "pp_size", None) or 1) > 1:
            raise ValueError(f"distributed_config.pp_size: got {size}, wanted 1: the loss is within one forward")


def keep_pairs_together(accelerator: Accelerator) -> None:
    """Each process collates its own batches; also of streaming datasets, which accelerate would rather dispatch.

    Raises:
        ValueError: batches are to be cut up by rows, which would tear chosen ones from rejected ones.
    """
    if accelerator.dispatch_batches:
        raise ValueError(
            "accelerator_config.dispatch_batches: got True, wanted False: it splits a batch by rows, and a pair's rows "
            "are half a batch apart"
        )
    accelerator.dataloader_config.dispatch_batches = False


def copies_of_a_batch(config: Any, model: nn.Module) -> int:
    """Return how many processes have the same pairs: those that share the model by tensor parallelism."""
    return getattr(model, "_tp_size", None) or getattr(config, "tp_size", None) or 1


def pairs_that_count(accelerator: Accelerator, pairs: int, copies: int) -> int:
    """Return how many of this process's `pairs` count. Those behind them repeat others, to even out the last batch.

    Args:
        copies: `copies_of_a_batch`.
    """
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return pairs
    before = accelerator.process_index // copies * pairs
    return min(max(state.remainder - before, 0), pairs)
