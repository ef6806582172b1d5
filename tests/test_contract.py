"""The public contract: what comes out of a call, and under which names."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from batches import EXTRAS, D, L, P, V, close, fields_equal, grads, pack, ragged, ragged_batch, reference_loss
from runnable import backends, reasons, runnable

from tdpo_kernels import LMHead, TDPOLoss, TDPOOutput, TokenStats, fused_tdpo_loss, token_stats
from tdpo_kernels.backends import BACKENDS

pytestmark = pytest.mark.usefixtures("tiles_of_5_by_16")


PAIR_FIELDS = [f.name for f in fields(TDPOOutput)][1:-1]
variants = pytest.mark.parametrize("options", [{"variant": "tdpo1"}, {"alpha": 0.7}, {"alpha": 0.0}, {}], ids=str)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_that_cannot_run_here_says_why(backend: str):
    """The one test that is skipped for it: the others are not collected."""
    if why := reasons()[backend]:
        pytest.skip(f"{backend}: {why}")
    assert backend in runnable()


# --- what comes out --------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_shapes_and_dtypes_padded(backend: str, dtype: torch.dtype):
    call = ragged_batch(dtype)
    stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    stats = token_stats(**call, backend=backend, extras=EXTRAS)
    for x in (stats.logp, stats.ref_logp, stats.kl, *stats.extras.values()):
        assert (x.shape, x.dtype, x.device) == ((2 * P, L), stats_dtype, call["labels"].device)
    out = fused_tdpo_loss(**call, backend=backend)
    assert (out.loss.shape, out.loss.dtype) == ((), stats_dtype)
    assert all((getattr(out, f).shape, getattr(out, f).dtype) == ((P,), stats_dtype) for f in PAIR_FIELDS)
    found = grads(out.loss, call["hidden"], call["head"])
    assert [(g.shape, g.dtype) for g in found] == [((2 * P, L, D), dtype), ((V, D), dtype)]


@backends
@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64], ids=str)
def test_shapes_and_dtypes_packed(backend: str, offsets_dtype: torch.dtype):
    padded, lengths = ragged()
    call = pack(padded, lengths)
    call["cu_seqlens"] = call["cu_seqlens"].to(offsets_dtype)
    stats = token_stats(**call, backend=backend)
    assert stats.logp.shape == stats.ref_logp.shape == stats.kl.shape == (sum(lengths),)
    out = fused_tdpo_loss(**call, backend=backend)
    assert all(getattr(out, f).shape == (3,) for f in PAIR_FIELDS)


@backends
def test_one_sequence_and_extra_axes_are_welcome_in_token_stats(backend: str):
    call = ragged_batch(rows=6)
    call |= {n: call[n].detach().unflatten(0, (2, 3)) for n in ("hidden", "ref_hidden", "labels")}
    whole = token_stats(**call, backend=backend)
    assert whole.logp.shape == (2, 3, L)
    rows = {name: call[name][1, 2] for name in ("hidden", "ref_hidden", "labels")}
    one = token_stats(**call | rows, backend=backend)
    fields_equal(one, TokenStats(whole.logp[1, 2], whole.ref_logp[1, 2], whole.kl[1, 2]))


def test_only_what_is_promised_is_differentiable():
    call = ragged_batch()
    call["ref_hidden"].requires_grad_(), call["ref_head"].requires_grad_()
    stats = token_stats(**call, extras=EXTRAS)
    assert stats.logp.requires_grad and stats.kl.requires_grad
    assert not any(x.requires_grad for x in (stats.ref_logp, *stats.extras.values()))
    out = fused_tdpo_loss(**call)
    assert out.loss.requires_grad
    assert not any(getattr(out, f).requires_grad for f in PAIR_FIELDS)
    assert not any(x.requires_grad for x in (out.tokens.logp, out.tokens.kl))
    out.loss.backward()
    assert call["ref_hidden"].grad is None and call["ref_head"].grad is None


def test_outputs_are_frozen_and_named_as_promised():
    assert [f.name for f in fields(TDPOOutput)] == [
        "loss", "chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps", "chosen_kl", "rejected_kl",
        "chosen_rewards", "rejected_rewards", "tokens",
    ]  # fmt: skip
    assert [f.name for f in fields(TokenStats)][:3] == ["logp", "ref_logp", "kl"]
    with pytest.raises(AttributeError):
        fused_tdpo_loss(**ragged_batch()).loss = None


def test_signature_is_the_contract_s():
    shared = dict(ignore_index=-100, shift=True, cu_seqlens=None, extras=(), backend="auto", memory_budget=2**30)
    own = dict(beta=0.1, alpha=None, variant="tdpo2", reduction="mean", sft_weight=0.0, length_normalized=False)
    positional = ["hidden", "head", "ref_hidden", "ref_head", "labels"]
    for function, extra in ((fused_tdpo_loss, own), (token_stats, {})):
        parameters = inspect.signature(function).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
        assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == shared | extra
    assert {p.name: p.default for p in inspect.signature(LMHead).parameters.values() if p.name != "weight"} == dict(
        bias=None, logit_scale=1.0, softcap=None
    )


# --- the numbers -----------------------------------------------------------------------------------------------------


@backends
@variants
def test_loss_rewards_and_gradients_are_equations_1_to_5(backend: str, options: dict):
    call = ragged_batch()
    out = fused_tdpo_loss(**call, **options, beta=0.3, reduction="none", backend=backend)
    want = reference_loss(call, beta=0.3, **options)
    fields_equal(out, want)
    weights = torch.tensor([1.0, -2.5], dtype=torch.float64)
    leaves = call["hidden"], call["head"]
    close(grads((out.loss * weights).sum(), *leaves), grads((want.loss * weights).sum(), *leaves))


def test_alpha_none_is_a_half_and_beta_a_tenth():
    call = ragged_batch()
    fields_equal(fused_tdpo_loss(**call), fused_tdpo_loss(**call, alpha=0.5, beta=0.1, variant="tdpo2"))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_over_pairs(reduction: str):
    each = fused_tdpo_loss(**ragged_batch(), reduction="none").loss
    assert each.shape == (P,)
    close(fused_tdpo_loss(**ragged_batch(), reduction=reduction).loss, getattr(each, reduction)())


# --- the module, and names -------------------------------------------------------------------------------------------


@variants
def test_module_is_the_function(options: dict):
    call = ragged_batch()
    options = options | dict(beta=0.2, shift=False, reduction="sum", memory_budget=0, backend=runnable()[-1])
    module = pickle.loads(pickle.dumps(TDPOLoss(**options)))
    fields_equal(module(*call.values()), fused_tdpo_loss(**call, **options))
    assert not list(module.parameters()) and not module.state_dict()
    assert "beta=0.2" in repr(module) and "tdpo" in repr(module)


def test_module_takes_offsets():
    call = pack(*ragged())
    fields_equal(TDPOLoss(variant="tdpo1")(**call), fused_tdpo_loss(**call, variant="tdpo1"))


def test_numpy_s_numbers_are_numbers():
    given = dict(beta=np.float32(0.5), alpha=np.float64(0.7), ignore_index=np.int64(-100), memory_budget=np.int32(999))
    plain = {name: x.item() for name, x in given.items()}
    fields_equal(fused_tdpo_loss(**ragged_batch(), **given), fused_tdpo_loss(**ragged_batch(), **plain))


@pytest.mark.parametrize("backend", ("auto", *runnable()))
def test_a_named_backend_is_the_one_that_runs(backend: str, monkeypatch: pytest.MonkeyPatch):
    ran = []
    for name, real in BACKENDS.items():
        seen = real._replace(make=lambda inputs, _n=name, _m=real.make: (ran.append(_n), _m(inputs))[1])
        monkeypatch.setitem(BACKENDS, name, seen)
    fused_tdpo_loss(**ragged_batch(torch.float32), backend=backend)
    assert ran == [backend] or backend == "auto" and len(ran) == 1 and ran[0] in runnable()


def test_what_holds_tensors_is_equal_to_itself_only():
    """The equality of a dataclass asks tensors for one truth value, and raises."""
    call = ragged_batch()
    for x in (LMHead(call["head"]), token_stats(**call), fused_tdpo_loss(**call)):
        assert x == x and x != replace(x) and x != "x" and x in [x] and {x: 1}[x] == 1
