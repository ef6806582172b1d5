"""Law 6 across two gloo processes on a CPU: gradients under DDP (TRL #7245), sharded heads (FSDP2, DTensor)."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from processes import run
from runnable import backends
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tdpo_kernels import fused_tdpo_loss

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")

WORLD, P, L, D, V = 2, 4, 5, 8, 19


class Step(nn.Module):
    """A backbone, a head, and the loss inside the module that is wrapped."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(D, D).double(), nn.Linear(D, V).double()
        self.backend = backend

    def forward(self, x: Tensor, ref_hidden: Tensor, ref_head: Tensor, labels: Tensor) -> Tensor:
        hidden = self.backbone(x).tanh()
        return fused_tdpo_loss(hidden, self.head, ref_hidden, ref_head, labels, backend=self.backend).loss


def batch() -> dict[str, Tensor]:
    """P pairs, chosen first; ranks have different numbers of tokens that count."""
    g = torch.Generator().manual_seed(1)
    x, ref_hidden = torch.randn(2, 2 * P, L, D, generator=g, dtype=torch.float64)
    labels = torch.randint(0, V, (2 * P, L), generator=g)
    labels[0, :4] = labels[P, :2] = -100
    return dict(x=x, ref_hidden=ref_hidden, ref_head=torch.randn(V, D, generator=g).double(), labels=labels)


def share(call: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The rank's pairs: its chosen rows, then their rejected partners."""
    size = P // WORLD
    mine = torch.arange(rank * size, (rank + 1) * size)
    rows = torch.cat([mine, mine + P])
    return {name: x if name == "ref_head" else x[rows] for name, x in call.items()}


def gradients(step: nn.Module, call: dict[str, Tensor]) -> list[Tensor]:
    step(**call).backward()
    return [p.grad for p in step.parameters()]


def ddp_gradients_are_the_whole_batch_s(rank: int, backend: str) -> None:
    want = gradients(Step(backend), batch())
    mine = share(batch(), rank)
    alone = gradients(Step(backend), mine)
    assert not any(torch.allclose(a, b, rtol=1e-6) for a, b in zip(alone, want, strict=True)), "nothing to synchronise"
    wrapped = DistributedDataParallel(Step(backend))
    for _ in range(2):  # the reducer is rebuilt after the first
        wrapped.zero_grad()
        for got, exact in zip(gradients(wrapped, mine), want, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-14)


@backends
def test_ddp_gradients_are_those_of_one_process_with_the_whole_batch(backend: str):
    run(ddp_gradients_are_the_whole_batch_s, backend)


def sharded_heads_are_refused_by_name(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard  # slow to import, and not needed by every test's processes
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh, call = init_device_mesh("cpu", (WORLD,)), batch()
    options = dict(hidden=call["x"], head=call["ref_head"], ref_hidden=call["ref_hidden"], ref_head=call["ref_head"])
    sharded = nn.Linear(D, V).double()
    fully_shard(sharded)
    placed = [distribute_tensor(call["ref_head"], mesh, [p]) for p in (Shard(0), Shard(1), Replicate())]
    changes = [(name, x) for name in ("head", "ref_head") for x in (sharded, *placed)]
    changes.append(("hidden", distribute_tensor(call["x"], mesh, [Shard(0)])))
    for name, x in changes:
        with pytest.raises(TypeError, match=rf"^{name}.*: got a .*DTensor.*, wanted a plain dense tensor"):
            fused_tdpo_loss(**options | {name: x}, labels=call["labels"])


def test_sharded_heads_are_refused_by_name():
    """`full_tensor()` under FSDP2 gives a wrong head gradient: nobody gathers behind the user's back."""
    run(sharded_heads_are_refused_by_name)
