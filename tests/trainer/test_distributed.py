"""Two gloo processes on a CPU: every gradient is that of one process with the whole batch.

A case that fails is reported under its name, with its traceback.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import processes
import pytest
import tiny
import torch
import torch.distributed as dist
from tdpo_trainer.forward import pair_outputs, reference_side
from tdpo_trainer.head import check_head
from test_forward import loss_on
from test_head import ADAPTERS, adapted
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")

WORLD = 2
EXACT = 1e-6  # of the largest gradient of the parameter; float64, but for the norms of transformers, which are in fp32


# -- the step, and what it should give ---------------------------------------------------------------------------------


def backward(
    wrapped: nn.Module, policy: nn.Module, reference: tuple[nn.Module, nn.Module], batch: dict[str, Tensor],
    run: Callable[[Tensor], Any] = Tensor.backward, parts: int = 1, **options,
) -> Tensor:  # fmt: skip
    """One micro-batch through whatever wraps the policy and the reference (wrapped, unwrapped)."""
    inputs = tiny.inputs_of(batch)
    side = reference_side(reference[0], inputs, unwrapped=reference[1])
    out = pair_outputs(wrapped, side, inputs, loss_on(batch["labels"], **options), unwrapped=policy)
    loss = out["loss"] + 0.25 * out.get("aux_loss", 0.0)
    run(loss / parts)
    return loss.detach()


def halves(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [tiny.share(batch, part, 2) for part in range(2)]


def alone(name: str, micro: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Gradients of the whole batch in one process, by the published formula on whole logits.

    A mixture's auxiliary loss is one of a micro-batch, so it is a mean over those of all ranks and steps.
    """
    policy, reference, batch = tiny.build(name, dtype=dtype), tiny.build(name, seed=5, dtype=dtype), tiny.batch()
    parts = [half for part in halves(batch) for half in (halves(part) if micro == 2 else [part])]
    total: Any = 0.0
    for part in parts:
        own, theirs = policy(**tiny.inputs_of(part)), reference(**tiny.inputs_of(part))
        loss = tiny.published_loss(own.logits, theirs.logits.detach(), part["labels"])
        total = total + (loss + 0.25 * (getattr(own, "aux_loss", None) or 0.0)) / len(parts)
    named = dict(policy.named_parameters())
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


def differences(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    for name, x in want.items():
        assert x.abs().max() > 0, f"{name} is not tried"
        error = float((got[name].double() - x.double()).norm() / x.double().norm())
        assert error <= tolerance, f"the gradient of {name} is off by {error:.2g} of its norm"


# -- DDP ---------------------------------------------------------------------------------------------------------------


def ddp(rank: int, name: str, micro: int = 1) -> None:
    policy, reference = tiny.build(name), tiny.build(name, seed=5)
    wrapped = nn.parallel.DistributedDataParallel(policy)
    mine = tiny.share(tiny.batch(), rank, WORLD)
    check_head(policy, tiny.inputs_of(mine), wrapped=wrapped)
    want = alone(name, micro)
    for _ in range(2):  # the reducer is rebuilt after the first
        wrapped.zero_grad()
        parts = halves(mine) if micro == 2 else [mine]
        for k, part in enumerate(parts):
            with wrapped.no_sync() if k < len(parts) - 1 else nullcontext():
                backward(wrapped, policy, (reference, reference), part, parts=len(parts))
        differences({name: x.grad for name, x in policy.named_parameters()}, want, EXACT)


def ddp_adapters(rank: int) -> None:
    for options in ADAPTERS.values():
        policy, want = adapted_twins(options)
        wrapped = nn.parallel.DistributedDataParallel(policy)
        differences(own_reference(policy, wrapped, tiny.share(tiny.batch(), rank, WORLD)), want, EXACT)


def own_reference(policy: nn.Module, wrapped: nn.Module, batch: dict) -> dict[str, Tensor]:
    """Gradients of a policy that is its own reference: two forwards through the wrapper, one without a gradient."""
    inputs = tiny.inputs_of(batch)
    side = reference_side(wrapped, inputs, unwrapped=policy, policy_within=policy.disable_adapter)
    pair_outputs(wrapped, side, inputs, loss_on(batch["labels"]), unwrapped=policy)["loss"].backward()
    return {name: x.grad for name, x in policy.named_parameters() if x.requires_grad}


def adapted_twins(options: dict) -> tuple[nn.Module, dict[str, Tensor]]:
    """A policy, and the gradients of its twin on the whole batch, in this process alone."""
    policy, twin = adapted(**options), adapted(**options)
    twin.load_state_dict(policy.state_dict())
    return policy, own_reference(twin, twin, tiny.batch())


# -- FSDP1 -------------------------------------------------------------------------------------------------------------


def fsdp1(
    rank: int, name: str, original: bool = True, units: str = "layers", micro: int = 1,
    narrow: torch.dtype | None = None,
) -> None:  # fmt: skip
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

    mixed = narrow and MixedPrecision(param_dtype=narrow, reduce_dtype=narrow, buffer_dtype=narrow)
    wrap = partial(
        FullyShardedDataParallel, use_orig_params=original, device_id=torch.device("cpu"), mixed_precision=mixed
    )
    policy, reference = tiny.build(name), tiny.build(name, seed=5)
    before = {name: x.detach().clone() for name, x in policy.named_parameters()}
    sides = wrap_units(policy, units, wrap), wrap_units(reference, units, wrap)
    mine = tiny.share(tiny.batch(), rank, WORLD)
    check_head(policy, tiny.inputs_of(mine), wrapped=sides[0])
    want = alone(name, micro)
    optimizer = torch.optim.SGD(sides[0].parameters(), lr=1.0)
    parts = halves(mine) if micro == 2 else [mine]
    for k, part in enumerate(parts):
        with sides[0].no_sync() if k < len(parts) - 1 else nullcontext():
            backward(sides[0], policy, (sides[1], reference), part, parts=len(parts))
    optimizer.step()
    with FullyShardedDataParallel.summon_full_params(sides[0], writeback=False):
        after = {plain_name(name): x.detach().clone() for name, x in sides[0].named_parameters()}
    got = {name: before[name] - after[name] for name in before}
    differences(got, want, EXACT if narrow is None else 4e-3 if narrow is torch.float32 else 6e-2)


def fsdp1_adapters(rank: int, options: dict, leaves: bool = False) -> None:
    """``leaves``: every adapter is a unit of its own, as peft's wrapping policy makes them."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    policy, want = adapted_twins(options)
    wrap = partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))
    if leaves:
        from peft.utils.other import fsdp_auto_wrap_policy

        wrap = partial(wrap, auto_wrap_policy=fsdp_auto_wrap_policy(policy))
    before = {name: x.detach().clone() for name, x in policy.named_parameters() if x.requires_grad}
    wrapped = wrap(policy)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=1.0)
    own_reference(policy, wrapped, tiny.share(tiny.batch(), rank, WORLD))
    optimizer.step()
    with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
        after = {plain_name(name): x.detach().clone() for name, x in wrapped.named_parameters()}
    differences({name: before[name] - after[name] for name in before}, want, EXACT)


def plain_name(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "")


def wrap_units(model: nn.Module, units: str, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    layers = model.model.layers
    if units != "root":
        for k in range(len(layers)):
            layers[k] = wrap(layers[k])
    if units == "layers and head":
        model.lm_head = wrap(model.lm_head)
    return wrap(model)


# -- FSDP2 -------------------------------------------------------------------------------------------------------------


def shard_units(model: nn.Module, units: str, **options) -> None:
    from torch.distributed.fsdp import fully_shard

    if units != "root":
        for layer in model.model.layers:
            fully_shard(layer, **options)
    if units == "layers and head":
        fully_shard(model.lm_head, **options)
    if units == "norm with head":  # transformers' own plan, and torchtitan's
        fully_shard([model.model.norm, model.lm_head], **options)
    if units == "embedding with head":  # what torch wants of tied weights in a unit of their own
        fully_shard([model.model.embed_tokens, model.lm_head], **options)
    if units == "accelerate":
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        tail = [model.model.norm, *([model.model.embed_tokens] if tied else []), model.lm_head]
        if not tied:
            fully_shard(model.model.embed_tokens, **options)
        fully_shard(tail, **options | dict(reshard_after_forward=False))
    fully_shard(model, **options)


def fsdp2(
    rank: int, name: str, units: str = "layers", micro: int = 1, narrow: torch.dtype | None = None,
    budget: int = 2**29, **options,
) -> None:  # fmt: skip
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    mixed = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=narrow, output_dtype=narrow)
    policy, reference = tiny.build(name), tiny.build(name, seed=5)
    for model in (policy, reference):
        shard_units(model, units, mesh=mesh, mp_policy=mixed, **options)
    mine = tiny.share(tiny.batch(), rank, WORLD)
    check_head(policy, tiny.inputs_of(mine), wrapped=policy)
    want = alone(name, micro)
    tolerance = EXACT if narrow is None else 1e-4 if narrow is torch.float32 else 6e-2
    for _ in range(2):
        policy.zero_grad()
        parts = halves(mine) if micro == 2 else [mine]
        for k, part in enumerate(parts):
            policy.set_requires_gradient_sync(k == len(parts) - 1)
            loss = backward(policy, policy, (reference, reference), part, parts=len(parts), memory_budget=budget)
            assert loss.dtype == (torch.float64 if narrow is None else torch.float32)
        differences({name: x.grad.full_tensor() for name, x in policy.named_parameters()}, want, tolerance)


def fsdp2_adapters(rank: int, options: dict) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    policy, want = adapted_twins(options)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in policy.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    for _ in range(2):
        policy.zero_grad()
        got = own_reference(policy, policy, tiny.share(tiny.batch(), rank, WORLD))
        differences({name: x.full_tensor() for name, x in got.items()}, want, EXACT)


# -- the processes -----------------------------------------------------------------------------------------------------

Case = Callable[[int], None]
CASES: dict[str, dict[str, Case]] = {
    "ddp": {
        "untied": partial(ddp, name="llama"),
        "tied": partial(ddp, name="gemma2"),
        "mixture": partial(ddp, name="mixtral"),
        "accumulated": partial(ddp, name="llama", micro=2),
        "adapters": ddp_adapters,
    },
    "fsdp1": {
        "root": partial(fsdp1, name="llama", units="root"),
        "layers": partial(fsdp1, name="llama"),
        "flat": partial(fsdp1, name="llama", original=False),
        "layers and head": partial(fsdp1, name="llama", units="layers and head"),
        "layers and head, flat": partial(fsdp1, name="llama", original=False, units="layers and head"),
        "tied": partial(fsdp1, name="gemma2"),
        "tied, flat": partial(fsdp1, name="llama tied", original=False),
        "accumulated": partial(fsdp1, name="llama", micro=2),
        "accumulated, head": partial(fsdp1, name="llama", micro=2, units="layers and head"),
        "fp32": partial(fsdp1, name="llama", units="layers and head", narrow=torch.float32),
        "bf16": partial(fsdp1, name="llama", units="layers and head", narrow=torch.bfloat16),
        "bf16 tied": partial(fsdp1, name="gemma2", narrow=torch.bfloat16),
        **{f"adapters, {name}": partial(fsdp1_adapters, options=options) for name, options in ADAPTERS.items()},
        "adapters as units": partial(fsdp1_adapters, options=ADAPTERS["backbone"], leaves=True),
    },
    "fsdp2": {
        "root": partial(fsdp2, name="llama", units="root"),
        "layers": partial(fsdp2, name="llama"),
        "layers and head": partial(fsdp2, name="llama", units="layers and head"),
        "layers and head, nothing staged": partial(fsdp2, name="llama", units="layers and head", budget=0),
        "norm with head": partial(fsdp2, name="llama", units="norm with head"),
        "resharded": partial(fsdp2, name="llama", reshard_after_forward=True),
        "resharded head": partial(fsdp2, name="llama", units="layers and head", reshard_after_forward=True),
        "resharded norm with head": partial(fsdp2, name="llama", units="norm with head", reshard_after_forward=True),
        "never resharded": partial(fsdp2, name="llama", units="layers and head", reshard_after_forward=False),
        "tied": partial(fsdp2, name="gemma2"),
        "tied, resharded": partial(fsdp2, name="llama tied", reshard_after_forward=True),
        "tied, embedding with head": partial(fsdp2, name="llama tied", units="embedding with head"),
        "accelerate": partial(fsdp2, name="llama", units="accelerate"),
        "accelerate, tied": partial(fsdp2, name="llama tied", units="accelerate"),
        "accelerate, bf16": partial(fsdp2, name="llama", units="accelerate", narrow=torch.bfloat16),
        "scaled": partial(fsdp2, name="cohere"),
        "mixture": partial(fsdp2, name="mixtral"),
        "accumulated": partial(fsdp2, name="llama", micro=2),
        "accumulated, head": partial(fsdp2, name="llama", micro=2, units="layers and head"),
        "fp32": partial(fsdp2, name="llama", units="layers and head", narrow=torch.float32),
        "bf16": partial(fsdp2, name="llama", units="layers and head", narrow=torch.bfloat16),
        "bf16 tied": partial(fsdp2, name="gemma2", narrow=torch.bfloat16),
        **{f"adapters, {name}": partial(fsdp2_adapters, options=options) for name, options in ADAPTERS.items()},
    },
}


def run(cases: dict[str, Case]) -> None:
    """All of them in one pair of processes: to start those takes longer than the cases."""
    results = torch.multiprocessing.get_context("forkserver").SimpleQueue()
    processes.run(_tried, cases, results, world=WORLD)
    if failed := results.get():
        text = "\n".join(f"--- {name}\n{trace}" for name, trace in failed.items())
        pytest.fail(f"{len(failed)} of {len(cases)} cases: {', '.join(failed)}\n{text}", pytrace=False)


def _tried(rank: int, cases: dict[str, Case], results) -> None:
    failed = {}
    for name, case in cases.items():
        seen: list[str | None] = [None] * WORLD
        dist.all_gather_object(seen, _failure(case, rank))
        if any(seen):
            failed[name] = "\n".join(filter(None, seen))
    if rank == 0:
        results.put(failed)


def _failure(case: Case, rank: int) -> str | None:
    try:
        case(rank)
    except Exception:
        return traceback.format_exc()
    return None


def test_gradients_are_those_of_one_process_with_the_whole_batch():
    run({f"{kind}, {name}": case for kind, cases in CASES.items() for name, case in cases.items()})
