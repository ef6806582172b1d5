"""Hold the three ways of `fused_tdpo_loss` to one another: rows as one, directions of a frozen head, groups of pairs.

Each is as accurate as plain torch, and has right gradients however a graph is used and over ranks.
"""

from __future__ import annotations

import pytest
import torch
from batches import EVERYTHING, headed, pack, ragged_batch, reference_loss, reference_stats, trained
from closeness import same_bits
from processes import run
from seeing import Products
from splitting import CUTS, cut, rows_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tdpo_kernels import directions, fused_tdpo_loss
from tdpo_kernels.parallel import vocab_parallel

ROW = 2 * 48 * 8  # bytes of a row's float64 logits, of 37 columns
WAYS = {"as one": (EVERYTHING, False), "directions": (15 * ROW, True), "groups": (15 * ROW, False)}
pytestmark = pytest.mark.usefixtures("short_blocks")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("upstream", [1.0, 1e-6, 3.7, 65536.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_way_is_less_accurate_than_plain_torch(way: str, upstream: float, reduction: str):
    """Law 1, in fp32 against the same numbers in float64."""
    call = ragged_batch(torch.float32, rows=6)
    budget, frozen = WAYS[way]
    hidden, weight = call["hidden"].detach(), call["head"].detach()

    def gradients(dtype: torch.dtype, loss) -> list[Tensor]:
        x, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(not frozen)
        given = call | {"hidden": x, "head": w} | {n: call[n].to(dtype) for n in ("ref_hidden", "ref_head")}
        return list(torch.autograd.grad((loss(given) * upstream).sum(), [x] if frozen else [x, w]))

    def plain(given: dict) -> Tensor:
        each = reference_loss(given).loss
        return each if reduction == "none" else getattr(each, reduction)()

    truth, yardstick = gradients(torch.float64, plain), gradients(torch.float32, plain)
    ours = gradients(
        torch.float32, lambda given: fused_tdpo_loss(**given, reduction=reduction, memory_budget=budget // 2).loss
    )
    for x, y, z in zip(ours, yardstick, truth, strict=True):
        allowed = 2 * (y - z).norm() + 4 * torch.finfo(torch.float32).eps * z.norm()
        assert (x - z).norm() <= allowed


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("normalized, sft", [(True, 0.0), (False, 0.7), (True, 0.7)])
@pytest.mark.parametrize("variant", [dict(variant="tdpo1"), dict(alpha=0.7)], ids=["tdpo1", "tdpo2"])
def test_an_sft_term_and_means_in_place_of_sums(variant: dict, normalized: bool, sft: float, packed: bool, way: str):
    """Against the formulas, written out with torch on the statistics of the reference."""
    budget, frozen = WAYS[way]
    call, leaves = trained(headed(), frozen)
    stats, counts = reference_stats(call), (call["labels"] != -100).sum(-1)
    per = 1.0 / counts if normalized else 1.0
    m, k = ((x.sum(-1) * per).chunk(2) for x in (stats.logp - stats.ref_logp, stats.kl))
    d = k[1] - k[0] if "variant" in variant else 0.7 * (k[1] - k[0].detach())
    nll = -(stats.logp.sum(-1) / counts).chunk(2)[0]
    want = (-torch.nn.functional.logsigmoid(0.5 * (m[0] - m[1] - d)) + sft * nll).mean()
    options = dict(beta=0.5, sft_weight=sft, length_normalized=normalized, memory_budget=budget) | variant
    out = fused_tdpo_loss(**(pack(call, [9] * 6) if packed else call), **options)
    torch.testing.assert_close(out.loss, want)
    torch.testing.assert_close(out.chosen_rewards, 0.5 * (m[0] + k[0]).detach())
    torch.testing.assert_close(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(want, leaves))


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_finite_stays_in_its_pair(way: str):
    (budget, frozen), call = WAYS[way], headed()
    call["hidden"] = call["hidden"].detach().clone()
    call["hidden"][1] = torch.nan
    call, leaves = trained(call, frozen)
    out = fused_tdpo_loss(**call, memory_budget=budget)
    (dh,) = torch.autograd.grad(out.loss, leaves[:1])
    assert dh[1].isnan().any() and dh[[0, 2, 3, 5]].isfinite().all() and out.chosen_logps[[0, 2]].isfinite().all()


# --- how graphs are used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_retained_graph_gives_the_same_gradients_twice(way: str):
    """Where forward made the gradients, backward makes no product, and a weight that has changed does not matter."""
    budget, frozen = WAYS[way]
    call, leaves = trained(headed(), frozen)
    loss = fused_tdpo_loss(**call, memory_budget=budget).loss * 3
    if way != "as one":
        call["head"].weight.detach().zero_()
    with Products() as products:
        first, second = torch.autograd.grad(loss, leaves, retain_graph=True), torch.autograd.grad(loss, leaves)
    assert same_bits(first, second) and all(x.any() for x in first) and bool(products.count) == (way == "as one")
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


class Tied(nn.Module):
    """A model whose head is its embedding."""

    def __init__(self, way: str, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        call = ragged_batch(torch.float64, rows=6)
        self.budget, self.frozen = WAYS[way]
        self.embedding = nn.Parameter(call["head"].detach().clone(), requires_grad=not (self.frozen and tied))
        self.body = nn.Linear(8, 8).double()
        self.head = self.embedding if tied else nn.Parameter(call["head"].detach(), requires_grad=not self.frozen)
        self.reference = {n: call[n] for n in ("ref_hidden", "ref_head")}

    def hidden(self, labels: Tensor) -> Tensor:
        return self.body(self.embedding[labels.clamp(min=0)]).tanh()

    def forward(self, labels: Tensor, rows: Tensor, wrap=lambda f, *x: f(*x)) -> Tensor:
        reference = self.reference["ref_hidden"][rows], self.reference["ref_head"]
        budget = {"memory_budget": self.budget}
        return wrap(
            lambda h, w: fused_tdpo_loss(h, w, *reference, labels, reduction="sum", **budget).loss,
            self.hidden(labels), self.head,
        )  # fmt: skip


def on_cpu(f, *x):
    with torch.autograd.graph.save_on_cpu():
        return f(*x)


WRAPS = {
    "reentrant": lambda f, *x: checkpoint(f, *x, use_reentrant=True),
    "not reentrant": lambda f, *x: checkpoint(f, *x, use_reentrant=False),
    "save on cpu": on_cpu,
}
ROWS = torch.arange(6)


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_and_offloading(way: str, tied: bool, wrap: str):
    labels = ragged_batch(rows=6)["labels"]
    plain, wrapped = Tied(way, tied), Tied(way, tied)
    plain(labels, ROWS).backward()
    wrapped(labels, ROWS, WRAPS[wrap]).backward()
    assert same_bits(gradients_of(plain), gradients_of(wrapped))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("way", WAYS)
def test_accumulated_gradients_are_the_sum(way: str, tied: bool):
    labels = ragged_batch(rows=6)["labels"]
    whole, parts = Tied("as one", tied), Tied(way, tied)
    whole(labels, ROWS).backward()
    for rows in (torch.tensor([0, 2, 3, 5]), torch.tensor([1, 4])):
        parts(labels[rows], rows).backward()
    by_name = dict(whole.named_parameters())
    for name, p in parts.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, by_name[name].grad)
    assert len(gradients_of(parts)) >= 2


# --- several processes ------------------------------------------------------------------------------------------------


def over_ranks(rank: int) -> None:
    directions.LEAST["cpu"] = 7
    _under_ddp(rank)
    _under_fsdp2(rank)
    for how in CUTS:
        _with_a_split_head(rank, how)


def _under_ddp(rank: int) -> None:
    """Law 6, TRL #7245: gradients averaged over ranks are those of the whole batch."""
    labels = ragged_batch(rows=6)["labels"]
    rows = torch.tensor([[0, 2, 3, 5], [1, 4]][rank])
    for way in WAYS:
        whole = Tied(way, False)
        whole(labels, ROWS).backward()
        wrapped = DistributedDataParallel(Tied(way, False))
        for _ in range(2):  # the reducer is rebuilt after the first
            wrapped.zero_grad()
            (2 * wrapped(labels[rows], rows)).backward()
            torch.testing.assert_close(gradients_of(wrapped), gradients_of(whole))


def _under_fsdp2(rank: int) -> None:
    """Parameters are gathered for forward and freed after it; a dW or dh made in forward outlives that."""
    labels = ragged_batch(rows=6)["labels"]
    rows = torch.tensor([[0, 2, 3, 5], [1, 4]][rank])
    mesh = init_device_mesh("cpu", (2,))
    for way in WAYS:
        whole, sharded = Tied(way, False), Tied(way, False)
        whole(labels, ROWS).backward()
        fully_shard(sharded, mesh=mesh)
        for _ in range(2):
            sharded.zero_grad()
            (2 * sharded(labels[rows], rows)).backward()
            torch.testing.assert_close([g.full_tensor() for g in gradients_of(sharded)], gradients_of(whole))
        for model in (whole, sharded):
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        stepped = [x.detach().full_tensor() for x in sharded.parameters()]
        torch.testing.assert_close(stepped, [x.detach() for x in whole.parameters()])


def _with_a_split_head(rank: int, how: str) -> None:
    """Ranks of one column, or of none, cut rows into the blocks and groups of the one with the most."""
    call = headed()
    columns = rows_of(37, 2, how)[rank]
    for frozen in (False, True):
        (alone, wants), (own, leaves) = trained(call, frozen), trained(call, frozen)
        own["head"] = vocab_parallel(cut(own["head"], columns))
        out = fused_tdpo_loss(**own, memory_budget=15 * ROW)
        want = fused_tdpo_loss(**alone, memory_budget=EVERYTHING)
        grads, exact = (torch.autograd.grad(x.loss, y) for x, y in ((out, leaves), (want, wants)))
        torch.testing.assert_close(grads[0], exact[0])
        for got, wanted in zip(grads[1:], exact[1:], strict=True):
            torch.testing.assert_close(got[columns], wanted[columns])
            assert not replace_rows(got, columns).any()


def replace_rows(x: Tensor, rows: slice) -> Tensor:
    """Return x with zeros in these rows."""
    x = x.clone()
    x[rows] = 0
    return x


def test_ranks():
    run(over_ranks)
