"""`torch.compile`: a training step in one graph, to the bit what it is without; and the operators by themselves."""

from __future__ import annotations

from dataclasses import fields
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from batches import EXTRAS, D, E, L, P, V, pack, ragged_batch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from tdpo_kernels import LMHead, TDPOLoss, fused_tdpo_loss, token_stats

batch = partial(ragged_batch, torch.float32)


@pytest.fixture(autouse=True)
def fresh(small_tiles):
    """No graph from another test, and tiles of 5 x 16: several of them, and short last ones."""
    torch._dynamo.reset()
    small_tiles(5, 16)
    yield
    torch._dynamo.reset()


def compiled(function, **options):
    """Everything of torch.compile but the code generator, which sees the operators as calls."""
    return torch.compile(function, fullgraph=True, backend=options.pop("backend", "aot_eager"), **options)


def packed(lengths: tuple[int, ...], seed: int = 0) -> dict:
    return pack(batch(rows=len(lengths), seed=seed), list(lengths))


def leaves(call: dict) -> list[Tensor]:
    head = call["head"]
    every = (call["hidden"], *((head.weight, head.bias) if isinstance(head, (LMHead, nn.Linear)) else (head,)))
    return [x for x in every if x is not None and x.requires_grad]


def values(out) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    parts = out.values() if isinstance(out, dict) else [getattr(out, f.name) for f in fields(out)]
    return [x for part in parts for x in values(part)]


def assert_same(function, *calls: dict, **options) -> None:
    """Values and gradients of each call, compiled as one graph and not, to the bit."""
    whole = compiled(function, **options)
    for call in calls:
        results = []
        for each in (function, whole):
            out = each(**call)
            loss = out.loss if hasattr(out, "loss") else (out.logp - 3 * out.kl).cos()
            gradients = torch.autograd.grad(loss.sum(), leaves(call)) if leaves(call) else ()
            results.append([*values(out), *gradients])
            assert loss.requires_grad == bool(leaves(call))
        assert len(results[0]) == len(results[1])
        for want, got in zip(*results, strict=True):
            assert torch.equal(want, got) and want.dtype == got.dtype


# --- a training step -------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """A language model in miniature, head last."""

    def __init__(self, tied: bool, bias: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.body = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return F.gelu(self.body(self.embed(tokens)))


@pytest.mark.parametrize("tied, head", [(False, "trained"), (False, "frozen"), (False, "bias"), (True, "trained")])
def test_a_training_step_is_one_graph(tied: bool, head: str):
    torch.manual_seed(0)
    model, reference, module = Tiny(tied, head == "bias"), Tiny(tied, head == "bias"), TDPOLoss(beta=0.3)
    if head == "frozen":
        model.head.requires_grad_(False)
    tokens = torch.randint(0, V, (2 * P, L))

    def step(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            ref_hidden = reference(tokens)
        return module(model(tokens), model.head, ref_hidden, reference.head, tokens).loss

    results = []
    for function in (step, compiled(step)):
        model.zero_grad()
        loss = function(tokens)
        loss.backward()
        results.append({n: x.grad for n, x in model.named_parameters()} | {"loss": loss.detach()})
    want, got = results
    assert (want["body.weight"] is not None) and all((want[n] is None) == (got[n] is None) for n in want)
    for n in want:
        if want[n] is not None:
            assert torch.equal(got[n], want[n]), n


def sideways(call: dict) -> dict:
    return call | {"head": call["head"].detach().T.contiguous().T.requires_grad_()}


def test_a_transposed_weight_has_a_gradient_under_inductor():
    """Inductor holds an operator to the strides that it was traced with; what it makes of the rest rounds otherwise."""
    call = sideways(batch())
    losses = [f(**call).loss for f in (fused_tdpo_loss, compiled(fused_tdpo_loss, backend="inductor"))]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves(call)) for loss in losses))


def sliced(call: dict, *names: str) -> dict:
    """Hidden states that are no matrix in memory."""
    cut = {n: torch.cat([call[n], call[n]], 1).detach()[:, :L] for n in names}
    return call | {"hidden": call["hidden"].detach().requires_grad_()} | cut


def whole(**options) -> dict:
    return batch() | {"labels": batch()["labels"].clamp(min=3)} | options


CALLS = {
    "tdpo2": batch,
    "tdpo1": lambda: batch() | dict(variant="tdpo1", beta=0.4),
    "dpo": lambda: batch() | dict(alpha=0.0),
    "none": lambda: batch() | dict(reduction="none"),
    "no shift": lambda: batch() | dict(shift=False),
    "naive": lambda: batch() | dict(backend="naive"),
    "nothing kept": lambda: batch() | dict(memory_budget=0),
    "other ignore_index": lambda: whole(ignore_index=3),
    "every label": lambda: whole(ignore_index=None),
    "packed": lambda: packed((5, 0, 7, 3)),
    "packed, none": lambda: packed((5, 0, 7, 3)) | dict(reduction="none"),
    "modules": lambda: batch() | {"head": nn.Linear(D, V), "ref_head": nn.Linear(E, V)},
    "head stored sideways": lambda: sideways(batch()),
    "both sliced": lambda: sliced(batch(), "hidden", "ref_hidden"),
}


@pytest.mark.parametrize("name", CALLS)
def test_loss(name: str):
    assert_same(lambda **call: fused_tdpo_loss(**call), CALLS[name]())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics_in_any_dtype(dtype: torch.dtype):
    """Some tiles kept, others made again."""
    assert_same(lambda **call: token_stats(**call, memory_budget=3000, extras=EXTRAS), ragged_batch(dtype))


@pytest.mark.parametrize("wanted", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "weight", "bias")], ids=str)
def test_parts_that_want_a_gradient(wanted: tuple[str, ...]):
    call = batch()
    parts = dict(hidden=call["hidden"], weight=call["head"], bias=torch.linspace(-1, 1, V))
    parts = {n: x.detach().requires_grad_(n in wanted) for n, x in parts.items()}
    head = LMHead(parts["weight"], parts["bias"], logit_scale=0.7, softcap=5.0)
    assert_same(lambda **call: token_stats(**call), call | {"hidden": parts["hidden"], "head": head})


def test_inside_and_around_autocast():
    def inside(**call):
        with torch.autocast("cpu", torch.bfloat16):
            return fused_tdpo_loss(**call)

    assert_same(inside, batch())
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(lambda **call: fused_tdpo_loss(**call), batch())


def test_without_a_gradient():
    call = batch()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            want, got = fused_tdpo_loss(**call), compiled(lambda **call: fused_tdpo_loss(**call))(**call)
        assert all(torch.equal(a, b) for a, b in zip(values(want), values(got), strict=True))
        assert not got.loss.requires_grad


def test_backward_twice_and_what_torch_compile_refuses():
    call = batch()
    loss = compiled(lambda **call: fused_tdpo_loss(**call))(**call).loss
    first, second = (torch.autograd.grad(loss, leaves(call), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError):
        (g,) = torch.autograd.grad(loss, call["hidden"], create_graph=True)
        g.sum().backward()


def test_export():
    class Loss(nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return fused_tdpo_loss(*args).loss

    args = tuple(batch().values())
    assert torch.equal(torch.export.export(Loss(), args).module()(*args), Loss()(*args))


# --- other batches ---------------------------------------------------------------------------------------------------


def shorter(n: int) -> dict:
    call = batch(seed=n)
    call["hidden"] = call["hidden"].detach()[:, :n].clone().requires_grad_()
    return call | {name: call[name][:, :n] for name in ("ref_hidden", "labels")}


@pytest.mark.parametrize("dynamic", [None, True])
def test_another_length_is_another_batch_and_no_error(dynamic: bool | None):
    calls = [shorter(n) for n in (7, 9, 5)]
    assert_same(lambda **call: fused_tdpo_loss(**call), *calls, dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [None, True])
def test_another_packing_is_another_batch_and_no_error(dynamic: bool | None):
    calls = [packed(lengths, seed=sum(lengths)) for lengths in ((3, 4, 5, 2), (7, 1, 6, 4), (2, 2, 2, 9, 0, 5))]
    assert_same(lambda **call: fused_tdpo_loss(**call), *calls, dynamic=dynamic)


def test_more_or_fewer_ignored_labels_do_not_recompile():
    function = lambda **call: fused_tdpo_loss(**call)  # noqa: E731
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    whole = torch.compile(function, fullgraph=True, backend=counter)
    call = batch()
    for n in range(L):
        call["labels"] = call["labels"].clone()
        call["labels"][:, :n] = -100
        assert torch.equal(whole(**call).loss, function(**call).loss)
    assert counter.frame_count == 1


def test_the_graphs_hold_the_two_operators_and_no_label():
    seen = []

    def noting(graph, _):
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=noting, bw_compiler=noting)
    torch.compile(lambda **call: fused_tdpo_loss(**call), fullgraph=True, backend=backend)(**batch()).loss.backward()
    assert [sum(x.startswith("tdpo_kernels") for x in targets) for targets in seen] == [1, 1], seen
    assert not any(word in x for targets in seen for x in targets for word in ("nonzero", "aminmax", "scalar_dense"))
