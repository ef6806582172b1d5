"""Law 5: a bad call gets an error naming the argument, what was seen and what is wanted, before any matrix product."""

from __future__ import annotations

import pytest
import torch
from refusals import INPUTS, LABELS, LOSS, ONLY_PAIRS, OPTIONS, D, E, L, P, V, good, relabelled
from runnable import backends
from seeing import Products
from torch import nn
from torch.autograd import forward_ad

from tdpo_kernels import LMHead, TDPOLoss, fused_tdpo_loss, token_stats
from tdpo_kernels.backends import BACKENDS


def table(*groups: dict) -> list:
    return [pytest.param(*row, id=name) for group in groups for name, row in group.items()]


def refused(function, call: dict, kind: type, words: str) -> None:
    versions = [x._version for x in call.values() if isinstance(x, torch.Tensor)]
    with Products() as products, pytest.raises(Exception) as caught:  # noqa: B017
        function(**call)
    assert products.count == 0, "the error came after a matrix product"
    assert versions == [x._version for x in call.values() if isinstance(x, torch.Tensor)], "inputs were changed"
    assert type(caught.value) is kind, f"{type(caught.value).__name__}: {caught.value}"
    missing = [word for word in ("wanted", *words.split(" | ")) if word not in str(caught.value)]
    assert not missing, f"not in the message: {missing}; it reads: {caught.value}"


@pytest.mark.parametrize("changes, kind, words", table(*INPUTS, OPTIONS, LOSS))
def test_loss_refuses(changes: dict, kind: type, words: str):
    refused(fused_tdpo_loss, good() | changes, kind, words)


STATS = [{k: v for k, v in group.items() if k not in ONLY_PAIRS} for group in (*INPUTS, OPTIONS)]


@pytest.mark.parametrize("changes, kind, words", table(*STATS))
def test_stats_refuse(changes: dict, kind: type, words: str):
    refused(token_stats, good() | changes, kind, words)


@backends
@pytest.mark.parametrize("changes, kind, words", table(LABELS))
def test_labels_are_checked_whatever_the_backend(backend: str, changes: dict, kind: type, words: str):
    refused(token_stats, good() | changes | {"backend": backend}, kind, words)


@pytest.mark.parametrize("changes, kind, words", table(LOSS, OPTIONS))
def test_module_refuses_at_construction(changes: dict, kind: type, words: str):
    refused(TDPOLoss, changes, kind, words)


EXTRAS = [("entropi",), "entropy", (1,), None, 3, ("entropy", "entropy"), (["entropy"],)]


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
def test_strange_extras_are_refused_before_any_work(extras: object):
    words = f"extras | {extras!r} | tuple | entropy, mean_logit, is_argmax"
    refused(token_stats, good() | {"extras": extras}, ValueError, words)


@pytest.mark.parametrize("backend", [["tiled"], {}], ids=str)
def test_unhashable_backend_is_named(backend: object):
    for function, call in ((token_stats, good()), (TDPOLoss, {})):
        with pytest.raises((TypeError, ValueError), match="backend"):
            function(**call, backend=backend)


def test_a_known_backend_is_accepted_by_the_module_wherever_it_runs():
    """A call, which knows the device, says where a backend does not run."""
    assert all(TDPOLoss(backend=name).options["backend"] == name for name in ("auto", *BACKENDS))


@pytest.mark.parametrize("big", [2**63, 2**70, 10**300], ids=["2^63", "2^70", "10^300"])
def test_a_large_int_is_a_number_too(big: int):
    """An int counts as the float it equals: torch does not multiply by an int beyond int64."""
    call = good()
    for options in ({"beta": big}, {"alpha": big}):
        a, b = (fused_tdpo_loss(**call, **{k: f(x) for k, x in options.items()}) for f in (int, float))
        assert torch.equal(a.loss, b.loss)
    for option in ("logit_scale", "softcap"):
        heads = (LMHead(call["head"].double(), **{option: f(big)}) for f in (int, float))
        wide = {name: call[name].double() for name in ("hidden", "ref_hidden", "ref_head")}
        a, b = (token_stats(**call | wide | {"head": head}, shift=False) for head in heads)
        assert torch.equal(a.logp, b.logp) or (a.logp.isnan() == b.logp.isnan()).all()


# --- heads that are more than their weight ----------------------------------------------------------------------------


class WithAdapter(nn.Linear):
    """loralib's way to put LoRA on a head: an nn.Linear with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def of_its_own(head: nn.Linear) -> None:
    head.forward = lambda x: nn.functional.linear(x, 2 * head.weight)


LINEARS = {
    "head | WithAdapter | forward": (WithAdapter, lambda head: None),
    "head | Linear | forward of its own": (nn.Linear, of_its_own),
    "head | Linear | forward hooks": (nn.Linear, lambda head: head.register_forward_hook(lambda m, a, out: 2 * out)),
    "head | Linear | hooks": (nn.Linear, lambda head: head.register_forward_pre_hook(lambda m, a: (2 * a[0],))),
    "head | Linear | backward hook": (nn.Linear, lambda head: head.register_full_backward_hook(lambda m, i, o: None)),
    "head | Linear | backward pre": (nn.Linear, lambda head: head.register_full_backward_pre_hook(lambda m, o: None)),
    "head | LazyLinear | initial": (lambda d, v: nn.LazyLinear(v), lambda head: None),
}


@pytest.mark.parametrize("words", LINEARS)
def test_a_linear_that_is_more_than_its_weight_is_refused(words: str):
    """A head's other work would silently not happen."""
    make, change = LINEARS[words]
    head, ref_head = make(D, V), make(E, V)
    change(head), change(ref_head)
    refused(token_stats, good() | {"head": head}, TypeError, words)
    refused(token_stats, good() | {"ref_head": ref_head}, TypeError, words.replace("head", "ref_head", 1))


def test_a_linear_that_only_keeps_its_weight_elsewhere_is_a_linear():
    plain = nn.Linear(D, V, bias=False)
    other = nn.utils.parametrizations.weight_norm(nn.Linear(D, V, bias=False))
    other.weight = plain.weight.detach()
    a, b = (token_stats(**good() | {"head": head}) for head in (plain, other))
    assert torch.allclose(a.logp, b.logp, rtol=1e-5)


# --- what is made of a call by torch's transforms ---------------------------------------------------------------------


CALL = good()


def logp(hidden: torch.Tensor) -> torch.Tensor:
    return token_stats(**CALL | {"hidden": hidden}, shift=False).logp


def in_dual(hidden: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        return logp(forward_ad.make_dual(hidden, torch.ones_like(hidden)))


TRANSFORMS = {
    "vmap": lambda x: torch.func.vmap(logp)(x[None]),
    "torch.func": torch.func.grad(lambda x: logp(x).sum()),
    "forward-mode | jvp": lambda x: torch.func.jvp(logp, (x,), (torch.ones_like(x),)),
    "forward-mode": in_dual,
    "torch.jit.trace": lambda x: torch.jit.trace(logp, (x,)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("words", TRANSFORMS)
def test_transforms_of_torch_that_no_operator_follows_are_refused_by_name(words: str):
    refused(lambda hidden: TRANSFORMS[words](hidden), {"hidden": good()["hidden"]}, TypeError, f"hidden | {words}")


# --- smaller ones -----------------------------------------------------------------------------------------------------


def test_everything_on_meta_is_refused_in_words():
    call = {name: x.to("meta") for name, x in good().items()}
    with pytest.raises((TypeError, ValueError, NotImplementedError), match="meta"):
        fused_tdpo_loss(**call)


def test_bad_options_are_refused_even_with_nothing_to_do():
    call = good() | {"labels": torch.full((2 * P, L), -100)}
    for changes, kind, words in (*OPTIONS.values(), *LOSS.values()):
        refused(fused_tdpo_loss, call | changes, kind, words)


@pytest.mark.parametrize("ignore_index", [-100, 0, V + 3, -1])
def test_ignore_index_itself_is_never_out_of_range(ignore_index: int):
    call = good() | relabelled(ignore_index) | {"ignore_index": ignore_index}
    assert fused_tdpo_loss(**call).loss.isfinite()


def test_dropped_first_label_may_be_anything():
    labels = good()["labels"]
    labels[:, 0] = -7
    assert token_stats(**good() | {"labels": labels}).logp.isfinite().all()


def test_float64_with_autocast_keeps_its_own_words():
    call = good() | {"hidden": torch.randn(2 * P, L, D).double()}
    with torch.autocast("cpu", torch.bfloat16):
        refused(token_stats, call, TypeError, "hidden | float64 | head.weight | float32")


def test_counter_sees_a_good_call_s_products():
    with Products() as products:
        token_stats(**good())
    assert products.count >= 2
