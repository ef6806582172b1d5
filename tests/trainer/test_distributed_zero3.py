"""ZeRO-3 in two gloo processes on a CPU, where deepspeed is installed: parameters after a step are one process's."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import partial

import pytest
import tiny
import torch
from tdpo_trainer.head import check_head
from test_distributed import alone, backward, differences, halves, run

from tdpo_kernels import directions, groups

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def config(micro: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": tiny.P // 2 // micro,
        "gradient_accumulation_steps": micro,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }


def zero3(rank: int, name: str, micro: int = 1, **options) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    policy, reference = (tiny.build(name, seed, torch.float32) for seed in (0, 5))
    before = {name: x.detach().clone() for name, x in policy.named_parameters()}
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=policy, optimizer=optimizer, config=config(micro))
    frozen, *_ = deepspeed.initialize(model=reference, config=config(micro))
    mine = tiny.share(tiny.batch(), rank, 2)
    check_head(policy, tiny.inputs_of(mine), wrapped=engine)
    for part in halves(mine) if micro == 2 else [mine]:
        backward(engine, policy, (frozen, reference), part, run=engine.backward, **options)
        engine.step()
    got = {}
    for name_, x in policy.named_parameters():
        with deepspeed.zero.GatheredParameters(x):
            got[name_] = before[name_] - x.detach()
    differences(got, alone(name, micro, torch.float32), 1e-4)


def zero3_by_groups(rank: int) -> None:
    """A trained head's gradients are made in forward, a group of pairs at a time, while its weight is whole."""
    ran: list = []
    groups.run, directions.LEAST["cpu"] = _counted(groups.run, ran), 7
    zero3(rank, "llama", memory_budget=4 * 2 * 48 * 14)
    assert ran


def _counted(function: Callable, calls: list) -> Callable:
    return lambda *args: (calls.append(1), function(*args))[1]


def test_parameters_after_a_step_are_those_of_one_process():
    cases = {  # no gemma2: under ZeRO-3 its embedding has another gradient than alone, with its own logits too
        "untied": partial(zero3, name="llama"),
        "tied": partial(zero3, name="llama tied"),
        "accumulated": partial(zero3, name="llama", micro=2),
        "by groups": zero3_by_groups,
    }
    run(cases)
