"""`torch.compile`: a training step in one graph, to the bit what it is without; and the operators by themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._python_dispatch import TorchDispatchMode

import tdpo_kernels
from tdpo_kernels import LMHead, TDPOLoss, fused_tdpo_loss, token_stats

P, L, D, E, V = 2, 7, 8, 6, 37
EXTRAS = ("entropy", "mean_logit", "is_argmax")


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


def batch(dtype: torch.dtype = torch.float32, rows: tuple[int, ...] = (2 * P, L), seed: int = 0) -> dict:
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, V, rows, generator=gen)
    labels[..., 1:3] = -100
    return dict(
        hidden=randn(*rows, D).requires_grad_(), head=randn(V, D).requires_grad_(),
        ref_hidden=randn(*rows, E), ref_head=randn(V, E), labels=labels,
    )  # fmt: skip


def packed(lengths: tuple[int, ...], seed: int = 0) -> dict:
    return batch(rows=(sum(lengths),), seed=seed) | {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}


def leaves(call: dict) -> list[Tensor]:
    head = call["head"]
    every = (call["hidden"], *((head.weight, head.bias) if isinstance(head, (LMHead, nn.Linear)) else (head,)))
    return [x for x in every if x is not None and x.requires_grad]


def values(out) -> list[Tensor]:
    every = [getattr(out, f.name) for f in fields(out)]
    return [x for part in every for x in (part.values() if isinstance(part, dict) else [part])]


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
            assert all(x.requires_grad == bool(leaves(call)) for x in (loss,))
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


STEPS = [(tied, head, "aot_eager") for tied in (False, True) for head in ("trained", "frozen", "bias")]


@pytest.mark.parametrize("tied, head, backend", [*STEPS, (False, "trained", "inductor"), (False, "frozen", "inductor")])
def test_a_training_step_is_one_graph(tied: bool, head: str, backend: str):
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
    for function in (step, compiled(step, backend=backend)):
        model.zero_grad()
        loss = function(tokens)
        loss.backward()
        results.append({n: x.grad for n, x in model.named_parameters()} | {"loss": loss.detach()})
    want, got = results
    assert (want["body.weight"] is not None) and all((want[n] is None) == (got[n] is None) for n in want)
    for n in want:
        if want[n] is not None:
            exact = backend == "aot_eager"  # the generated code around the loss rounds in its own way
            torch.testing.assert_close(got[n], want[n], **({"rtol": 0, "atol": 0} if exact else {}))


LOSSES = [
    {},
    {"variant": "tdpo1", "beta": 0.4},
    {"alpha": 0.0},
    {"reduction": "sum", "alpha": 0.7},
    {"reduction": "none"},
    {"shift": False},
    {"ignore_index": 3},
    {"backend": "naive"},
    {"memory_budget": 0},
]


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_loss_padded(options: dict):
    call = batch()
    if options.get("ignore_index") is not None:
        call["labels"] = call["labels"].clamp(min=3)
    assert_same(lambda **call: fused_tdpo_loss(**call, **options), call)


@pytest.mark.parametrize("options", LOSSES[:5], ids=str)
def test_loss_packed(options: dict):
    assert_same(lambda **call: fused_tdpo_loss(**call, **options), packed((5, 0, 7, 3)))


def test_every_label_counts():
    call = batch()
    call["labels"] = call["labels"].clamp(min=0)
    for shift in (False, True):
        assert_same(lambda shift=shift, **call: fused_tdpo_loss(**call, ignore_index=None, shift=shift), call)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics_in_any_dtype(dtype: torch.dtype):
    """Some tiles kept, others made again."""
    assert_same(lambda **call: token_stats(**call, memory_budget=3000), batch(dtype))


def test_extras():
    assert_same(lambda **call: token_stats(**call, extras=EXTRAS), batch())


@pytest.mark.parametrize("wanted", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "weight", "bias")], ids=str)
def test_parts_that_want_a_gradient(wanted: tuple[str, ...]):
    call = batch()
    parts = dict(hidden=call["hidden"], weight=call["head"], bias=torch.linspace(-1, 1, V))
    parts = {n: x.detach().requires_grad_(n in wanted) for n, x in parts.items()}
    head = LMHead(parts["weight"], parts["bias"], logit_scale=0.7, softcap=5.0)
    assert_same(lambda **call: token_stats(**call), call | {"hidden": parts["hidden"], "head": head})


def test_heads_as_modules_and_with_biases():
    torch.manual_seed(0)
    call = batch() | {"head": nn.Linear(D, V), "ref_head": nn.Linear(E, V)}
    assert_same(lambda **call: fused_tdpo_loss(**call), call)


@pytest.mark.parametrize("name", ["hidden", "ref_hidden", "both"])
def test_hidden_states_that_are_no_matrix(name: str):
    call = batch()
    for n in ("hidden", "ref_hidden") if name == "both" else (name,):
        call[n] = torch.cat([call[n], call[n]], 1).detach()[:, :L]
    call["hidden"] = call["hidden"].detach().requires_grad_()
    assert_same(lambda **call: fused_tdpo_loss(**call), call)


def test_heads_stored_sideways():
    call = batch()
    sideways = call["head"].detach().T.contiguous().T.requires_grad_()
    assert_same(lambda **call: fused_tdpo_loss(**call), call | {"head": sideways})


def test_inside_and_around_autocast():
    call = batch()

    def inside(**call):
        with torch.autocast("cpu", torch.bfloat16):
            return fused_tdpo_loss(**call)

    assert_same(inside, call)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(lambda **call: fused_tdpo_loss(**call), call)


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


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_another_length_is_another_batch_and_no_error(dynamic: bool | None):
    calls = [batch(rows=(4, n), seed=n) for n in (7, 9, 5, 12)]
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


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(ref_hidden=torch.zeros(2 * P, L + 1, E)), ["ref_hidden", "(4, 8, 6)", "(4, 7, E)"]),
        (dict(labels=torch.zeros(2 * P, L)), ["labels", "float32", "int64"]),
        (dict(beta=-1.0), ["beta", "-1.0", "> 0"]),
        (dict(alpha=0.5, variant="tdpo1"), ["alpha", "tdpo1"]),
        (dict(backend="fast"), ["backend", "fast", "auto"]),
        (dict(head=torch.zeros(V, D).half()), ["head.weight", "float16", "float32"]),
    ],
    ids=str,
)
def test_a_call_that_is_wrong_whatever_the_values_is_refused_while_compiling(change: dict, words: list[str]):
    with pytest.raises(Exception) as error:  # noqa: B017
        compiled(lambda **call: fused_tdpo_loss(**call))(**batch() | change)
    assert all(word in str(error.value) for word in words)


def test_wrong_values_are_refused_when_it_runs():
    whole = compiled(lambda **call: fused_tdpo_loss(**call))
    call = batch()
    whole(**call)
    with pytest.raises(ValueError, match=r"labels: 1 label\(s\) outside \[0, 37\), the first is 40"):
        whole(**call | {"labels": call["labels"].index_fill(1, torch.tensor([0]), 5).clone().index_put_(
            (torch.tensor([1]), torch.tensor([4])), torch.tensor([40]))})  # fmt: skip
    whole = compiled(lambda **call: fused_tdpo_loss(**call))
    with pytest.raises(ValueError, match="cu_seqlens: decreases from 5 to 3"):
        whole(**packed((5, -2, 9, 3)))


# --- the operators by themselves -------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Notes the library's operators as they are called, and with what."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "tdpo_kernels":
            detached = [x.detach().clone() if isinstance(x, Tensor) else x for x in args]
            self.seen.append((func, tuple(detached), out))
        return out


def operators(call: dict, **options) -> list[tuple]:
    """Return the operators of a call and of its backward."""
    with Calls() as calls:
        out = token_stats(**call, **options)
        if out.logp.requires_grad:
            (out.logp - 3 * out.kl).sum().backward()
    return calls.seen


def samples() -> dict[str, list[tuple]]:
    biased = batch() | {"head": LMHead(batch()["head"], torch.zeros(V, requires_grad=True), 0.5, 7.0)}
    frozen = batch()
    frozen["head"].requires_grad_(False)
    return {
        "padded": operators(batch()),
        "bf16, some kept": operators(batch(torch.bfloat16), memory_budget=3000),
        "nothing kept": operators(batch(), memory_budget=0),
        "packed": operators(packed((5, 0, 7, 3))),
        "bias, softcap, extras": operators(biased, extras=EXTRAS),
        "frozen head": operators(frozen),
        "naive, no shift": operators(batch(), backend="naive", shift=False),
    }


@pytest.mark.parametrize("name", ["padded", "bf16, some kept", "nothing kept", "packed", "bias, softcap, extras",
                                  "frozen head", "naive, no shift"])  # fmt: skip
def test_opcheck(name: str):
    """An eager call is the two operators, and they keep the rules of torch's operators."""
    seen = samples()[name]
    assert [func.overloadpacket.__name__ for func, *_ in seen] == ["token_stats", "token_stats_backward"]
    for func, args, _ in seen:
        torch.library.opcheck(func, args)


def test_outputs_share_no_memory():
    for _, args, out in operators(batch(), extras=EXTRAS):
        storages = [x.untyped_storage()._cdata for x in (*out, *args) if isinstance(x, Tensor) and x.numel()]
        assert len(set(storages)) == len(storages)


CHILD = """
import json, sys, torch
before = set(sys.modules)
import tdpo_kernels
new = {name for name in set(sys.modules) - before if not name.startswith("tdpo_kernels")}
ops = sorted(name for name in dir(torch.ops.tdpo_kernels) if name.startswith("token_stats"))
print(json.dumps([sorted(new), ops]))
"""


def test_import_registers_the_operators_and_does_nothing_else():
    root = Path(tdpo_kernels.__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, cwd=root, timeout=60)
    assert done.returncode == 0, done.stderr
    new, ops = json.loads(done.stdout)
    assert not [name for name in new if name.startswith(("torch._dynamo", "torch._inductor", "sympy", "triton"))]
    assert {"token_stats", "token_stats_backward"} <= set(ops)
