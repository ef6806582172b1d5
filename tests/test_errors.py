"""Law 5: a bad call gets an error naming the argument, what was seen and what is wanted, before any matrix product."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from runnable import backend_params
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tdpo_kernels import LMHead, TDPOLoss, fused_tdpo_loss, token_stats
from tdpo_kernels.backends import BACKENDS

P, L, D, E, V = 2, 5, 8, 6, 11
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "matmul", "mv", "addmv", "dot", "linalg_vecdot"}
PRODUCTS |= {"_linear_pointwise"}  # oneDNN's


class Products(TorchDispatchMode):
    """Counts matrix products, and operators of the library's own, which make theirs out of sight."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in PRODUCTS or func.namespace == "tdpo_kernels"
        return func(*args, **(kwargs or {}))


class LooksLikeDTensor(torch.Tensor):
    """A DTensor needs a process group; this has the method that gives one away."""

    def full_tensor(self) -> torch.Tensor:
        raise AssertionError("nobody may gather behind the user's back")


def good() -> dict:
    gen = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen)

    return dict(
        hidden=randn(2 * P, L, D), head=randn(V, D), ref_hidden=randn(2 * P, L, E), ref_head=randn(V, E),
        labels=torch.randint(0, V, (2 * P, L), generator=gen),
    )  # fmt: skip


def packed(cu_seqlens: object) -> dict:
    call = good()
    rows = {name: call[name].flatten(0, 1) for name in ("hidden", "ref_hidden", "labels")}
    return rows | {"cu_seqlens": cu_seqlens}


def relabelled(value: int) -> dict:
    labels = good()["labels"]
    labels[1, 3] = value
    return {"labels": labels}


def offsets(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def dtensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).as_subclass(LooksLikeDTensor)


N = 2 * P * L
W = torch.randn(V, D)
SHAPES = {
    "odd row count": (dict(hidden=torch.randn(3, L, D)), ValueError, ["hidden", "(3, 5, 8)", "3 sequences", "2P"]),
    "no rows": (dict(hidden=torch.randn(0, L, D)), ValueError, ["hidden", "(0, 5, 8)", "0 sequences", "2P"]),
    "2-D hidden unpacked": (
        dict(hidden=torch.randn(N, D)),
        ValueError,
        ["hidden", "(20, 8)", "(2P, L, D)", "cu_seqlens"],
    ),
    "4-D hidden": (dict(hidden=torch.randn(1, 4, L, D)), ValueError, ["hidden", "(1, 4, 5, 8)", "(2P, L, D)"]),
    "V mismatch": (
        dict(ref_head=torch.randn(V + 5, E)),
        ValueError,
        ["ref_head.weight", "(16, 6)", "V = 11", "head.weight (11, 8)"],
    ),
    "D mismatch": (
        dict(head=torch.randn(V, D + 1)),
        ValueError,
        ["head.weight", "(11, 9)", "(V, 8)", "hidden (4, 5, 8)"],
    ),
    "E mismatch": (
        dict(ref_head=torch.randn(V, E + 1)),
        ValueError,
        ["ref_head.weight", "(11, 7)", "(V, 6)", "ref_hidden (4, 5, 6)"],
    ),
    "head transposed": (dict(head=torch.randn(D, V)), ValueError, ["head.weight", "(8, 11)", "(V, 8)"]),
    "1-D head": (dict(head=torch.randn(V)), ValueError, ["head.weight", "(11,)", "(V, D)"]),
    "empty vocabulary": (dict(head=torch.randn(0, D)), ValueError, ["head.weight", "(0, 8)", "V >= 1"]),
    "labels shorter": (
        dict(labels=torch.zeros(4, L - 1).long()),
        ValueError,
        ["labels", "(4, 4)", "(4, 5)", "hidden (4, 5, 8)"],
    ),
    "labels flat": (dict(labels=torch.zeros(N).long()), ValueError, ["labels", "(20,)", "(4, 5)"]),
    "ref_hidden rows": (dict(ref_hidden=torch.randn(2, L, E)), ValueError, ["ref_hidden", "(2, 5, 6)", "(4, 5, E)"]),
    "0-d ref_hidden": (dict(ref_hidden=torch.tensor(1.0)), ValueError, ["ref_hidden", "()", "(4, 5, E)"]),
    "0-d labels": (dict(labels=torch.tensor(1)), ValueError, ["labels", "()", "(4, 5)"]),
    "0-d head": (dict(head=torch.tensor(1.0)), ValueError, ["head.weight", "()", "(V, D)"]),
    "0-d hidden": (dict(hidden=torch.tensor(1.0)), ValueError, ["hidden", "()", "(2P, L, D)"]),
    "zero-width ref_hidden": (
        dict(ref_hidden=torch.randn(4, L, 0), ref_head=torch.randn(V, 0)),
        ValueError,
        ["ref_hidden", "(4, 5, 0)", "at least one hidden dimension"],
    ),
    "ref_hidden flat": (dict(ref_hidden=torch.randn(N, E)), ValueError, ["ref_hidden", "(20, 6)", "(4, 5, E)"]),
    "bias shape": (dict(head=LMHead(W, torch.zeros(V + 1))), ValueError, ["head.bias", "(12,)", "(11,)"]),
    "bias of one": (dict(head=LMHead(W, torch.zeros(1))), ValueError, ["head.bias", "(1,)", "(11,)"]),
    "bias 2-D": (dict(head=LMHead(W, torch.zeros(1, V))), ValueError, ["head.bias", "(1, 11)", "(11,)"]),
    "ref bias shape": (
        dict(ref_head=LMHead(torch.randn(V, E), torch.zeros(3))),
        ValueError,
        ["ref_head.bias", "(3,)", "(11,)"],
    ),
}
DTYPES = {
    "int hidden": (dict(hidden=torch.zeros(4, L, D).int()), TypeError, ["hidden", "int32", "float32"]),
    "complex hidden": (dict(hidden=torch.zeros(4, L, D).cfloat()), TypeError, ["hidden", "complex64", "float32"]),
    "int ref_hidden": (dict(ref_hidden=torch.zeros(4, L, E).int()), TypeError, ["ref_hidden", "int32", "float32"]),
    "int8 head": (dict(head=torch.zeros(V, D).to(torch.int8)), TypeError, ["head.weight", "int8", "float32"]),
    "float8 head": (
        dict(head=torch.zeros(V, D).to(torch.float8_e4m3fn)),
        TypeError,
        ["head.weight", "float8", "bfloat16"],
    ),
    "float labels": (dict(labels=torch.zeros(4, L)), TypeError, ["labels", "float32", "int64"]),
    "bool labels": (dict(labels=torch.zeros(4, L).bool()), TypeError, ["labels", "bool", "int64"]),
    "uint8 labels": (dict(labels=torch.zeros(4, L).byte()), TypeError, ["labels", "uint8", "int64"]),
    "bf16 hidden, fp32 head": (
        dict(hidden=torch.randn(4, L, D).bfloat16()),
        TypeError,
        ["head.weight: got (11, 8) float32", "wanted bfloat16 as hidden (4, 5, 8) bfloat16", "autocast"],
    ),
    "fp32 hidden, bf16 head": (
        dict(head=W.bfloat16()),
        TypeError,
        ["head.weight: got (11, 8) bfloat16", "wanted float32 as hidden (4, 5, 8) float32", "autocast"],
    ),
    "bf16 ref_hidden": (
        dict(ref_hidden=torch.randn(4, L, E).bfloat16()),
        TypeError,
        ["ref_head.weight: got (11, 6) float32", "wanted bfloat16 as ref_hidden (4, 5, 6) bfloat16"],
    ),
    "bias dtype": (dict(head=LMHead(W, torch.zeros(V).double())), TypeError, ["head.bias", "float64", "float32"]),
}
DEVICES = {
    "hidden on meta": (dict(hidden=torch.empty(4, L, D, device="meta")), ValueError, ["hidden", "meta", "device"]),
    "head on meta": (dict(head=torch.empty(V, D, device="meta")), ValueError, ["head.weight", "meta", "cpu", "hidden"]),
    "ref_hidden on meta": (
        dict(ref_hidden=torch.empty(4, L, E, device="meta")),
        ValueError,
        ["ref_hidden", "meta", "cpu"],
    ),
    "ref_head on meta": (
        dict(ref_head=torch.empty(V, E, device="meta")),
        ValueError,
        ["ref_head.weight", "meta", "cpu"],
    ),
    "labels on meta": (dict(labels=torch.empty(4, L, device="meta").long()), ValueError, ["labels", "meta", "cpu"]),
    "bias on meta": (dict(head=LMHead(W, torch.empty(V, device="meta"))), ValueError, ["head.bias", "meta", "cpu"]),
}
KINDS = {
    "list hidden": (dict(hidden=[[1.0]]), TypeError, ["hidden", "list", "tensor"]),
    "numpy hidden": (dict(hidden=np.zeros((4, L, D), np.float32)), TypeError, ["hidden", "ndarray", "tensor"]),
    "None ref_hidden": (dict(ref_hidden=None), TypeError, ["ref_hidden", "None", "tensor"]),
    "list labels": (dict(labels=[1, 2]), TypeError, ["labels", "list", "tensor"]),
    "head is a module": (
        dict(head=nn.Sequential(nn.Linear(D, V))),
        TypeError,
        ["head", "Sequential", "nn.Linear", "LMHead"],
    ),
    "head is None": (dict(head=None), TypeError, ["head", "None", "nn.Linear"]),
    "ref_head is a tuple": (dict(ref_head=(W, None)), TypeError, ["ref_head", "tuple", "LMHead"]),
    "LMHead of an nn.Linear": (dict(head=LMHead(nn.Linear(D, V))), TypeError, ["head.weight", "Linear", "tensor"]),
    "bias is a float": (dict(head=LMHead(W, 0.5)), TypeError, ["head.bias", "0.5", "tensor"]),
    "sparse head": (dict(head=W.to_sparse()), TypeError, ["head.weight", "sparse", "dense"]),
    "sparse labels": (dict(labels=torch.zeros(4, L).long().to_sparse()), TypeError, ["labels", "sparse", "dense"]),
    "DTensor head": (dict(head=dtensor(V, D)), TypeError, ["head.weight", "LooksLikeDTensor", "plain"]),
    "DTensor hidden": (dict(hidden=dtensor(4, L, D)), TypeError, ["hidden", "LooksLikeDTensor", "plain"]),
}
HEADS = {
    "softcap 0": (dict(head=LMHead(W, softcap=0.0)), ValueError, ["head.softcap", "0.0", "> 0", "None"]),
    "softcap negative": (dict(head=LMHead(W, softcap=-30.0)), ValueError, ["head.softcap", "-30.0", "> 0"]),
    "softcap nan": (dict(head=LMHead(W, softcap=math.nan)), ValueError, ["head.softcap", "nan", "finite"]),
    "softcap text": (dict(head=LMHead(W, softcap="30")), TypeError, ["head.softcap", "'30'", "number"]),
    "softcap True": (dict(head=LMHead(W, softcap=True)), TypeError, ["head.softcap", "True", "number"]),
    "logit_scale inf": (dict(head=LMHead(W, logit_scale=math.inf)), ValueError, ["head.logit_scale", "inf", "finite"]),
    "logit_scale tensor": (
        dict(head=LMHead(W, logit_scale=torch.ones(()))),
        TypeError,
        ["head.logit_scale", "()", "number"],
    ),
    "logit_scale None": (dict(head=LMHead(W, logit_scale=None)), TypeError, ["head.logit_scale", "None", "number"]),
    "logit_scale 10^400": (
        dict(head=LMHead(W, logit_scale=10**400)),
        ValueError,
        ["head.logit_scale", "int of 1329 bits", "finite"],
    ),
    "softcap -10^9999": (dict(head=LMHead(W, softcap=-(10**9999))), ValueError, ["head.softcap", "bits", "finite"]),
    "ref softcap": (dict(ref_head=LMHead(torch.randn(V, E), softcap=-1.0)), ValueError, ["ref_head.softcap", "-1.0"]),
}
LABELS = {
    "label = V": (relabelled(V), ValueError, ["labels", "1 label", "[0, 11)", "11 at flat position 8", "ignore_index"]),
    "label negative": (relabelled(-1), ValueError, ["labels", "[0, 11)", "-1 at flat position 8", "ignore_index"]),
    "label huge": (relabelled(2**40), ValueError, ["labels", "[0, 11)", str(2**40)]),
    "other ignore_index": (relabelled(-100) | {"ignore_index": -1}, ValueError, ["labels", "-100 at flat position 8"]),
    "no ignore_index": (relabelled(-100) | {"ignore_index": None}, ValueError, ["labels", "-100 at flat position 8"]),
    "no pack": (
        relabelled(-100) | {"ignore_index": None, "shift": False},
        ValueError,
        ["labels", "-100 at flat position 8"],
    ),
    "int32 label": ({"labels": relabelled(V)["labels"].int()}, ValueError, ["labels", "11 at flat position 8"]),
}
OFFSETS = {
    "not from 0": (packed(offsets(1, 5, 10, 15, N)), ValueError, ["cu_seqlens", "from 1 to 20", "0 to N = 20"]),
    "not to N": (packed(offsets(0, 5, 10, 15, N - 1)), ValueError, ["cu_seqlens", "from 0 to 19", "0 to N = 20"]),
    "past N": (packed(offsets(0, 5, 10, 15, N + 1)), ValueError, ["cu_seqlens", "from 0 to 21", "0 to N = 20"]),
    "decreasing": (
        packed(offsets(0, 12, 10, 15, N)),
        ValueError,
        ["cu_seqlens", "12 to 10", "index 2", "never decrease"],
    ),
    "negative inside": (packed(offsets(0, -3, 10, 15, N)), ValueError, ["cu_seqlens", "0 to -3", "index 1"]),
    "float": (packed(offsets(0, 5, 10, 15, N).float()), TypeError, ["cu_seqlens", "float32", "int32", "int64"]),
    "int16": (packed(offsets(0, 5, 10, 15, N).short()), TypeError, ["cu_seqlens", "int16", "int64"]),
    "odd count": (packed(offsets(0, 5, 15, N)), ValueError, ["cu_seqlens", "3 sequences", "2P"]),
    "no sequence": (packed(offsets(0)), ValueError, ["cu_seqlens", "0 sequences", "2P"]),
    "empty": (packed(offsets()), ValueError, ["cu_seqlens", "(0,)"]),
    "2-D": (packed(offsets(0, 5, 10, 15, N)[None]), ValueError, ["cu_seqlens", "(1, 5)", "(S + 1,)"]),
    "list": (packed([0, 5, 10, 15, N]), TypeError, ["cu_seqlens", "list", "tensor"]),
    "with 3-D hidden": (
        dict(cu_seqlens=offsets(0, 5, 10, 15, N)),
        ValueError,
        ["hidden", "(4, 5, 8)", "(N, D)", "cu_seqlens"],
    ),
    "on meta": (packed(offsets(0, 5, 10, 15, N).to("meta")), ValueError, ["cu_seqlens", "meta", "cpu"]),
}
OPTIONS = {
    "ignore_index float": (dict(ignore_index=-100.0), TypeError, ["ignore_index", "-100.0", "int"]),
    "ignore_index bool": (dict(ignore_index=True), TypeError, ["ignore_index", "True", "int"]),
    "ignore_index 2^70": (dict(ignore_index=2**70), ValueError, ["ignore_index", "int of 71 bits", "int64"]),
    "ignore_index below int64": (dict(ignore_index=-(2**63) - 1), ValueError, ["ignore_index", "int64"]),
    "memory_budget -10^9999": (dict(memory_budget=-(10**9999)), ValueError, ["memory_budget", "bits", "bytes >= 0"]),
    "shift int": (dict(shift=1), TypeError, ["shift", "1", "True or False"]),
    "shift None": (dict(shift=None), TypeError, ["shift", "None", "True or False"]),
    "memory_budget negative": (dict(memory_budget=-1), ValueError, ["memory_budget", "-1", "bytes >= 0"]),
    "memory_budget float": (dict(memory_budget=1e9), ValueError, ["memory_budget", "float", "bytes >= 0"]),
    "memory_budget text": (dict(memory_budget="1GB"), ValueError, ["memory_budget", "'1GB'", "bytes >= 0"]),
    "memory_budget None": (dict(memory_budget=None), ValueError, ["memory_budget", "None", "bytes >= 0"]),
    "memory_budget True": (dict(memory_budget=True), ValueError, ["memory_budget", "True", "bytes >= 0"]),
    "backend unknown": (dict(backend="cuda"), ValueError, ["backend", "'cuda'", "'auto'", "'tiled'", "'naive'"]),
    "backend None": (dict(backend=None), ValueError, ["backend", "None", "'auto'"]),
}
LOSS = {
    "beta 0": (dict(beta=0.0), ValueError, ["beta", "0.0", "> 0"]),
    "beta negative": (dict(beta=-0.1), ValueError, ["beta", "-0.1", "> 0"]),
    "beta nan": (dict(beta=math.nan), ValueError, ["beta", "nan", "finite"]),
    "beta inf": (dict(beta=math.inf), ValueError, ["beta", "inf", "finite"]),
    "beta 10^400": (dict(beta=10**400), ValueError, ["beta", "int of 1329 bits", "finite"]),
    "beta -10^9999": (dict(beta=-(10**9999)), ValueError, ["beta", "bits", "finite"]),
    "alpha 10^400": (dict(alpha=10**400), ValueError, ["alpha", "int of 1329 bits", "finite"]),
    "alpha 10^9999 with tdpo1": (dict(variant="tdpo1", alpha=10**9999), ValueError, ["alpha", "bits", "tdpo1"]),
    "beta text": (dict(beta="0.1"), TypeError, ["beta", "'0.1'", "number"]),
    "beta tensor": (dict(beta=torch.tensor(0.1)), TypeError, ["beta", "number"]),
    "alpha negative": (dict(alpha=-0.5), ValueError, ["alpha", "-0.5", ">= 0"]),
    "alpha nan": (dict(alpha=math.nan), ValueError, ["alpha", "nan", "finite"]),
    "alpha text": (dict(alpha="half"), TypeError, ["alpha", "'half'", "number"]),
    "alpha with tdpo1": (dict(variant="tdpo1", alpha=0.5), ValueError, ["alpha", "0.5", "tdpo1", "leave it out"]),
    "alpha 0 with tdpo1": (dict(variant="tdpo1", alpha=0), ValueError, ["alpha", "tdpo1"]),
    "variant unknown": (dict(variant="dpo"), ValueError, ["variant", "'dpo'", "'tdpo1'", "'tdpo2'"]),
    "variant case": (dict(variant="TDPO2"), ValueError, ["variant", "'TDPO2'", "'tdpo2'"]),
    "reduction unknown": (dict(reduction="avg"), ValueError, ["reduction", "'avg'", "'mean'", "'sum'", "'none'"]),
    "reduction None": (dict(reduction=None), ValueError, ["reduction", "None", "'none'"]),
}
INPUTS = {
    "shapes": SHAPES,
    "dtypes": DTYPES,
    "devices": DEVICES,
    "kinds": KINDS,
    "heads": HEADS,
    "labels": LABELS,
    "offsets": OFFSETS,
}
ONLY_PAIRS = {"0-d hidden", "odd row count", "no rows", "2-D hidden unpacked", "4-D hidden", "odd count", "no sequence"}


def table(*groups: dict) -> list:
    return [pytest.param(*row, id=name) for group in groups for name, row in group.items()]


def refused(function, call: dict, kind: type, words: list[str]) -> None:
    with Products() as products, pytest.raises((ValueError, TypeError)) as caught:
        function(**call)
    assert products.count == 0, "the error came after a matrix product"
    assert type(caught.value) is kind, f"{type(caught.value).__name__}: {caught.value}"
    missing = [word for word in ("wanted", *words) if word not in str(caught.value)]
    assert not missing, f"not in the message: {missing}; it reads: {caught.value}"


@pytest.mark.parametrize("changes, kind, words", table(*INPUTS.values(), OPTIONS, LOSS))
def test_loss_refuses(changes: dict, kind: type, words: list[str]):
    refused(fused_tdpo_loss, good() | changes, kind, words)


STATS = [{k: v for k, v in group.items() if k not in ONLY_PAIRS} for group in (*INPUTS.values(), OPTIONS)]


@pytest.mark.parametrize("changes, kind, words", table(*STATS))
def test_stats_refuse(changes: dict, kind: type, words: list[str]):
    refused(token_stats, good() | changes, kind, words)


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("changes, kind, words", table(LABELS))
def test_labels_are_checked_whatever_the_backend(backend: str, changes: dict, kind: type, words: list[str]):
    refused(token_stats, good() | changes | {"backend": backend}, kind, words)


@pytest.mark.parametrize("changes, kind, words", table(LOSS, OPTIONS))
def test_module_refuses_at_construction(changes: dict, kind: type, words: list[str]):
    refused(TDPOLoss, changes, kind, words)


@pytest.mark.parametrize("changes, kind, words", table(*INPUTS.values()))
def test_module_refuses_at_call(changes: dict, kind: type, words: list[str]):
    options = {name: changes[name] for name in ("ignore_index", "shift") if name in changes}
    call = good() | {k: v for k, v in changes.items() if k not in options}
    refused(TDPOLoss(**options), call, kind, words)


@pytest.mark.parametrize("name", ["beta", "alpha", "variant", "reduction"])
def test_loss_options_are_no_business_of_token_stats(name: str):
    with pytest.raises(TypeError, match=name):
        token_stats(**good(), **{name: 1})


@pytest.mark.parametrize(
    "extras, words",
    [
        (("entropi",), ["extras", "entropi", "entropy", "mean_logit", "is_argmax"]),
        ("entropy", ["extras", "'entropy'", "tuple"]),
        ((1,), ["extras", "1", "entropy"]),
    ],
)
def test_extras_refused(extras: object, words: list[str]):
    refused(token_stats, good() | {"extras": extras}, ValueError, words)


@pytest.mark.parametrize("extras", [None, 3, ("entropy", "entropy"), (["entropy"],)])
def test_strange_extras_are_refused_before_any_work(extras: object):
    with Products() as products, pytest.raises((TypeError, ValueError), match="extras"):
        token_stats(**good(), extras=extras)
    assert products.count == 0


@pytest.mark.parametrize("backend", [["tiled"], {}], ids=str)
def test_unhashable_backend_is_named(backend: object):
    for call in (lambda: token_stats(**good(), backend=backend), lambda: TDPOLoss(backend=backend)):
        with pytest.raises((TypeError, ValueError), match="backend"):
            call()


def test_a_known_backend_is_accepted_by_the_module_wherever_it_runs():
    """Where it does not run is said by the call, which knows the device."""
    assert all(TDPOLoss(backend=name).options["backend"] == name for name in ("auto", *BACKENDS))


@pytest.mark.parametrize("big", [2**63, 2**70, 10**300], ids=["2^63", "2^70", "10^300"])
def test_a_large_int_is_a_number_too(big: int):
    """As the float it equals: torch does not multiply by an int beyond int64."""
    call = good()
    for options in ({"beta": big}, {"alpha": big}):
        a, b = (fused_tdpo_loss(**call, **{k: f(x) for k, x in options.items()}) for f in (int, float))
        assert torch.equal(a.loss, b.loss)
    for option in ("logit_scale", "softcap"):
        heads = (LMHead(call["head"].double(), **{option: f(big)}) for f in (int, float))
        wide = {name: call[name].double() for name in ("hidden", "ref_hidden", "ref_head")}
        a, b = (token_stats(**call | wide | {"head": head}, shift=False) for head in heads)
        assert torch.equal(a.logp, b.logp) or (a.logp.isnan() == b.logp.isnan()).all()


class WithAdapter(nn.Linear):
    """loralib's way to put LoRA on a head: an nn.Linear with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("name, width", [("head", D), ("ref_head", E)])
def test_a_linear_with_a_forward_of_its_own_is_refused(name: str, width: int):
    refused(token_stats, good() | {name: WithAdapter(width, V)}, TypeError, [name, "WithAdapter", "forward"])


def of_its_own(head: nn.Linear) -> None:
    head.forward = lambda x: nn.functional.linear(x, 2 * head.weight)


HOOKS = {
    "forward of its own": of_its_own,
    "hooks": lambda head: head.register_forward_hook(lambda module, args, out: 2 * out),
    "would not run": lambda head: head.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
}


@pytest.mark.parametrize("word", HOOKS)
def test_a_linear_that_is_more_than_its_weight_is_refused(word: str):
    head = nn.Linear(D, V)
    HOOKS[word](head)
    refused(token_stats, good() | {"head": head}, TypeError, ["head", word])


@pytest.mark.parametrize("softcap", (1e-300, 1e300))
def test_a_softcap_that_no_float32_holds_is_refused(softcap: float):
    refused(token_stats, good() | {"head": LMHead(torch.randn(V, D), softcap=softcap)}, ValueError, ["softcap"])


def test_a_linear_that_only_keeps_its_weight_elsewhere_is_a_linear():
    plain = nn.Linear(D, V, bias=False)
    other = nn.utils.parametrizations.weight_norm(nn.Linear(D, V, bias=False))
    other.weight = plain.weight.detach()
    a, b = (token_stats(**good() | {"head": head}) for head in (plain, other))
    assert torch.allclose(a.logp, b.logp, rtol=1e-5)


def test_everything_on_meta_is_refused_in_words():
    call = {name: x.to("meta") for name, x in good().items()}
    with pytest.raises((TypeError, ValueError, NotImplementedError), match="meta"):
        fused_tdpo_loss(**call)


def test_bad_options_are_refused_even_with_nothing_to_do():
    call = good() | {"labels": torch.full((2 * P, L), -100)}
    for changes, kind, words in (*OPTIONS.values(), *LOSS.values()):
        refused(fused_tdpo_loss, call | changes, kind, words)


def test_zero_width_hidden_gets_the_library_s_error():
    call = good() | {"hidden": torch.randn(2 * P, L, 0), "head": torch.randn(V, 0)}
    with pytest.raises(ValueError, match="hidden|head"):
        fused_tdpo_loss(**call)


@pytest.mark.parametrize("ignore_index", [-100, 0, V + 3, -1])
def test_ignore_index_itself_is_never_out_of_range(ignore_index: int):
    call = good() | relabelled(ignore_index) | {"ignore_index": ignore_index}
    assert fused_tdpo_loss(**call).loss.isfinite()


def test_dropped_first_label_may_be_anything():
    labels = good()["labels"]
    labels[:, 0] = -7
    assert token_stats(**good() | {"labels": labels}).logp.isfinite().all()


def test_range_check_counts_every_bad_label():
    labels = good()["labels"]
    labels[2, 1:4] = V
    refused(token_stats, good() | {"labels": labels}, ValueError, ["3 label(s)", "flat position 11"])


def test_float64_with_autocast_keeps_its_own_words():
    call = good() | {"hidden": torch.randn(2 * P, L, D).double()}
    with torch.autocast("cpu", torch.bfloat16):
        refused(token_stats, call, TypeError, ["hidden", "float64", "head.weight", "float32"])


def test_inputs_are_left_alone_by_a_refusal():
    call = good()
    before = {name: x.clone() for name, x in call.items()}
    with pytest.raises(ValueError):
        fused_tdpo_loss(**call, beta=-1.0)
    assert all(torch.equal(x, before[name]) for name, x in call.items())


def test_counter_sees_a_good_call_s_products():
    with Products() as products:
        token_stats(**good())
    assert products.count >= 2
