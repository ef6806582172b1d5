"""The public contract: what goes in, what comes out, and what must not matter."""

from __future__ import annotations

import inspect
import math
import pickle
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from runnable import backend_params, runnable
from torch import Tensor, nn

from tdpo_kernels import LMHead, TDPOLoss, TDPOOutput, TokenStats, fused_tdpo_loss, token_stats, types
from tdpo_kernels.backends import BACKENDS, slab

P, L, D, E, V = 2, 9, 8, 6, 37
EXTRAS = ("entropy", "mean_logit", "is_argmax")
PAIR_FIELDS = [f.name for f in fields(TDPOOutput)][1:]
backends = pytest.mark.parametrize("backend", backend_params())
variants = pytest.mark.parametrize("options", [{"variant": "tdpo1"}, {"alpha": 0.7}, {"alpha": 0.0}, {}], ids=str)


@pytest.fixture(autouse=True, params=[(5, 16), (1024, 1024)], ids=["tiles", "one_tile"])
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Tiles of 5 x 16, so that a few rows already cross row blocks and column blocks; and one tile."""
    monkeypatch.setitem(slab.TILE, "cpu", request.param)


def batch(dtype: torch.dtype = torch.float64, seed: int = 0, rows: tuple[int, ...] = (2 * P, L)) -> dict:
    """A call's arguments: ragged prompts and padding are ignored, the policy's parameters want gradients."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, V, rows, generator=gen)
    for s, row in enumerate(labels.view(-1, rows[-1])):
        row[: s % 3 + 1] = -100
        row[rows[-1] - s % 2 :] = -100
    hidden, head = randn(*rows, D).requires_grad_(), randn(V, D).requires_grad_()
    return dict(hidden=hidden, head=head, ref_hidden=randn(*rows, E), ref_head=randn(V, E), labels=labels)


def plain_stats(z: Tensor, r: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eqs. (1) and (2), and zeros where labels are ignored; the labels here are aligned with the logits."""
    log_p, log_q = z.log_softmax(-1), r.log_softmax(-1)
    valid = labels != -100
    pick = labels.clamp(min=0)[..., None]
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    logp, ref_logp = (x.gather(-1, pick)[..., 0] for x in (log_p, log_q))
    return tuple(torch.where(valid, x, 0.0) for x in (logp, ref_logp, kl))


def plain_loss(call: dict, beta: float = 0.1, alpha: float = 0.5, variant: str = "tdpo2") -> tuple[Tensor, dict]:
    """Eqs. (1) to (5) per pair, for padded rows, a Hugging Face shift, and plain tensors as heads."""
    z, r = (F.linear(call[x][:, :-1], call[w]) for x, w in (("hidden", "head"), ("ref_hidden", "ref_head")))
    logp, ref, kl = (x.sum(-1) for x in plain_stats(z, r, call["labels"][:, 1:]))
    margin = logp - ref
    half = len(logp) // 2
    k_w, k_l = kl[:half], kl[half:]
    d = k_l - k_w if variant == "tdpo1" else alpha * (k_l - k_w.detach())
    loss = -F.logsigmoid(beta * (margin[:half] - margin[half:] - d))
    seen = dict(logps=logp, ref=ref, kl=kl, rewards=beta * (margin + kl))
    return loss, {name: x.detach() for name, x in seen.items()}


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves, materialize_grads=False))


def close(got: object, want: object, tol: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def fields_equal(a: TDPOOutput | TokenStats, b: TDPOOutput | TokenStats) -> None:
    for f in fields(a):
        close(getattr(a, f.name), getattr(b, f.name))


def pack(call: dict, lengths: list[int]) -> dict:
    """The first `lengths[s]` positions of each row, end to end."""
    out = dict(call)
    for name in ("hidden", "ref_hidden", "labels"):
        out[name] = torch.cat([row[:n] for row, n in zip(call[name], lengths, strict=True)])
    return out | {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}


def ragged() -> tuple[dict, list[int]]:
    """Right-padded sequences: one of no tokens at all, one with an empty completion, one of a single token."""
    lengths = [L, 0, 4, 1, L - 2, 6]
    call = batch(rows=(6, L))
    labels = call["labels"].clone()
    for s, n in enumerate(lengths):
        labels[s, n:] = -100
    labels[2] = -100
    return call | {"labels": labels}, lengths


# --- what comes out --------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_shapes_and_dtypes_padded(backend: str, dtype: torch.dtype):
    call = batch(dtype)
    stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    stats = token_stats(**call, backend=backend, extras=EXTRAS)
    for x in (stats.logp, stats.ref_logp, stats.kl, *stats.extras.values()):
        assert (x.shape, x.dtype, x.device) == ((2 * P, L), stats_dtype, call["labels"].device)
    out = fused_tdpo_loss(**call, backend=backend)
    assert (out.loss.shape, out.loss.dtype) == ((), stats_dtype)
    assert all((getattr(out, f).shape, getattr(out, f).dtype) == ((P,), stats_dtype) for f in PAIR_FIELDS)
    grads = gradients(out.loss, call["hidden"], call["head"])
    assert [(g.shape, g.dtype) for g in grads] == [((2 * P, L, D), dtype), ((V, D), dtype)]


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
    call = batch(rows=(2, 3, L))
    whole = token_stats(**call, backend=backend)
    assert whole.logp.shape == (2, 3, L)
    rows = {name: call[name][1, 2] for name in ("hidden", "ref_hidden", "labels")}
    one = token_stats(**call | rows, backend=backend)
    fields_equal(one, TokenStats(whole.logp[1, 2], whole.ref_logp[1, 2], whole.kl[1, 2]))


def test_only_what_is_promised_is_differentiable():
    call = batch()
    call["ref_hidden"].requires_grad_()
    call["ref_head"].requires_grad_()
    stats = token_stats(**call, extras=EXTRAS)
    assert stats.logp.requires_grad and stats.kl.requires_grad
    assert not any(x.requires_grad for x in (stats.ref_logp, *stats.extras.values()))
    out = fused_tdpo_loss(**call)
    assert out.loss.requires_grad
    assert not any(getattr(out, f).requires_grad for f in PAIR_FIELDS)
    out.loss.backward()
    assert call["ref_hidden"].grad is None and call["ref_head"].grad is None


def test_outputs_are_frozen_and_named_as_promised():
    assert [f.name for f in fields(TDPOOutput)] == [
        "loss", "chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps", "chosen_kl", "rejected_kl",
        "chosen_rewards", "rejected_rewards",
    ]  # fmt: skip
    assert [f.name for f in fields(TokenStats)][:3] == ["logp", "ref_logp", "kl"]
    with pytest.raises(AttributeError):
        fused_tdpo_loss(**batch()).loss = None


def test_signature_is_the_contract_s():
    shared = dict(ignore_index=-100, shift=True, cu_seqlens=None, backend="auto", memory_budget=512 * 2**20)
    own = dict(beta=0.1, alpha=None, variant="tdpo2", reduction="mean")
    positional = ["hidden", "head", "ref_hidden", "ref_head", "labels"]
    for function, extra in ((fused_tdpo_loss, own), (token_stats, {"extras": ()})):
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
    call = batch()
    out = fused_tdpo_loss(**call, **options, beta=0.3, reduction="none", backend=backend)
    want, seen = plain_loss(call, beta=0.3, **options)
    close(out.loss, want)
    for field, name in (("logps", "logps"), ("kl", "kl"), ("rewards", "rewards")):
        close(torch.cat([getattr(out, f"chosen_{field}"), getattr(out, f"rejected_{field}")]), seen[name])
    close(torch.cat([out.ref_chosen_logps, out.ref_rejected_logps]), seen["ref"])
    weights = torch.tensor([1.0, -2.5], dtype=torch.float64)
    leaves = call["hidden"], call["head"]
    close(gradients((out.loss * weights).sum(), *leaves), gradients((want * weights).sum(), *leaves))


@backends
def test_token_stats_are_plain_torch_under_any_cotangents(backend: str):
    call = batch()
    leaves = call["hidden"], call["head"]
    stats = token_stats(**call, shift=False, backend=backend)
    z, r = F.linear(call["hidden"], call["head"]), F.linear(call["ref_hidden"], call["ref_head"])
    want = plain_stats(z, r, call["labels"])
    close((stats.logp, stats.ref_logp, stats.kl), want)
    u, v = torch.randn(2, 2 * P, L, dtype=torch.float64)
    close(
        gradients((u * stats.logp + v * stats.kl).sum(), *leaves), gradients((u * want[0] + v * want[2]).sum(), *leaves)
    )


def test_tdpo1_is_not_tdpo2_with_alpha_1():
    call = batch()
    one, two = (fused_tdpo_loss(**call, **x) for x in ({"variant": "tdpo1"}, {"alpha": 1.0}))
    close(one.loss, two.loss)
    g_one, g_two = (gradients(x.loss, call["head"])[0] for x in (one, two))
    assert (g_one - g_two).norm() > 1e-3 * g_one.norm()


def test_alpha_none_is_a_half_and_beta_a_tenth():
    call = batch()
    fields_equal(fused_tdpo_loss(**call), fused_tdpo_loss(**call, alpha=0.5, beta=0.1, variant="tdpo2"))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_over_pairs(reduction: str):
    call = batch()
    each = fused_tdpo_loss(**call, reduction="none").loss
    assert each.shape == (P,)
    close(fused_tdpo_loss(**call, reduction=reduction).loss, getattr(each, reduction)())


@backends
def test_extras_are_plain_torch_s(backend: str):
    call = batch()
    call["labels"][0, 5] = int((call["hidden"][0, 4] @ call["head"].T).argmax())
    z = F.linear(call["hidden"][:, :-1], call["head"]).detach()
    labels = call["labels"][:, 1:]
    valid = labels != -100
    log_p = z.log_softmax(-1)
    want = {
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "mean_logit": z.mean(-1),
        "is_argmax": (z.argmax(-1) == labels).to(z.dtype),
    }
    for names in (EXTRAS, EXTRAS[::-1], EXTRAS[:1], ["is_argmax"], ()):
        got = token_stats(**call, extras=names, backend=backend).extras
        assert list(got) == list(names)
        for name in names:
            assert not got[name][:, 0].any()
            close(got[name][:, 1:], torch.where(valid, want[name], 0.0))
    assert want["is_argmax"][0, 4] == 1


@backends
def test_extras_change_nothing_else(backend: str):
    call = batch(torch.float32)
    plain, more = (token_stats(**call, extras=x, backend=backend) for x in ((), EXTRAS))
    assert all(torch.equal(getattr(plain, f), getattr(more, f)) for f in ("logp", "ref_logp", "kl"))


@backends
@pytest.mark.parametrize("vocab", [1, 2, 16, 17])
def test_tiny_vocabularies(backend: str, vocab: int):
    call = batch()
    call |= {name: call[name].detach()[:vocab].requires_grad_() for name in ("head", "ref_head")}
    call["labels"] = torch.where(call["labels"] == -100, -100, call["labels"] % vocab)
    out, (want, _) = fused_tdpo_loss(**call, reduction="none", backend=backend), plain_loss(call)
    close(out.loss, want)
    leaves = call["hidden"], call["head"]
    close(gradients(out.loss.sum(), *leaves), gradients(want.sum(), *leaves))


# --- packing, shifting, ignoring -------------------------------------------------------------------------------------


@backends
@variants
@pytest.mark.parametrize("shift", [True, False])
def test_padded_is_packed(backend: str, options: dict, shift: bool):
    padded, lengths = ragged()
    call = pack(padded, lengths)
    leaves = padded["hidden"], padded["head"]
    a, b = (fused_tdpo_loss(**x, **options, shift=shift, reduction="none", backend=backend) for x in (padded, call))
    fields_equal(a, b)
    close(gradients(a.loss.sum(), *leaves), gradients(b.loss.sum(), *leaves))
    stats_a, stats_b = (token_stats(**x, shift=shift, backend=backend) for x in (padded, call))
    rows = [torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)]) for x in (stats_a.logp, stats_a.kl)]
    close(rows, [stats_b.logp, stats_b.kl])


@backends
def test_empty_completion_counts_as_nothing(backend: str):
    padded, lengths = ragged()
    for call in (padded, pack(padded, lengths)):
        out = fused_tdpo_loss(**call, backend=backend)
        for field in ("logps", "kl", "rewards"):
            sums = torch.cat([getattr(out, f"chosen_{field}"), getattr(out, f"rejected_{field}")])
            assert sums[[1, 2, 3]].eq(0).all(), field
            assert sums[[0, 4, 5]].ne(0).all(), field
        assert out.ref_chosen_logps[1] == 0


@backends
@pytest.mark.parametrize("where", ["front", "middle", "end", "everywhere"])
def test_sequences_of_no_tokens_packed(backend: str, where: str):
    lengths = {"front": [0, 3, 2, 4], "middle": [3, 0, 0, 4], "end": [3, 2, 4, 0], "everywhere": [0, 9, 0, 0]}[where]
    call = pack(batch() | {"labels": torch.randint(0, V, (2 * P, L))}, lengths)
    out = fused_tdpo_loss(**call, backend=backend, reduction="none")
    sums = torch.cat([out.chosen_kl, out.rejected_kl])
    assert torch.equal(sums == 0, torch.tensor(lengths) <= 1)
    gradients(out.loss.sum(), call["hidden"])


@backends
def test_shift_is_a_manual_shift(backend: str):
    call = batch()
    leaves = call["hidden"], call["head"]
    shifted = token_stats(**call, backend=backend)
    rows = {name: call[name][:, :-1] for name in ("hidden", "ref_hidden")}
    manual = token_stats(**call | rows | {"labels": call["labels"][:, 1:]}, shift=False, backend=backend)
    assert not shifted.logp[:, 0].any() and not shifted.kl[:, 0].any() and not shifted.ref_logp[:, 0].any()
    close((shifted.logp[:, 1:], shifted.ref_logp[:, 1:], shifted.kl[:, 1:]), (manual.logp, manual.ref_logp, manual.kl))
    close(gradients((shifted.logp - shifted.kl).sum(), *leaves), gradients((manual.logp - manual.kl).sum(), *leaves))


@backends
@pytest.mark.parametrize("packed", [False, True])
def test_shift_never_crosses_a_boundary(backend: str, packed: bool):
    """Even with every label counting, the last hidden state of a sequence predicts nothing."""
    call = batch() | {"labels": torch.randint(0, V, (2 * P, L))}
    lengths = [L, 3, 1, L]
    call = pack(call, lengths) if packed else call
    ends = call["cu_seqlens"][1:] - 1 if packed else (slice(None), -1)
    want = fused_tdpo_loss(**call, ignore_index=None, backend=backend)
    for name in ("hidden", "ref_hidden"):
        call[name] = call[name].detach().clone()
        call[name][ends] = math.nan
    got = fused_tdpo_loss(**call, ignore_index=None, backend=backend)
    fields_equal(got, want)


@backends
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("shift", [True, False])
def test_ignored_rows_reach_nothing(backend: str, poison: float, shift: bool):
    call = batch()
    used = call["labels"] != -100
    if shift:
        used = torch.cat([used[:, 1:], torch.zeros(2 * P, 1, dtype=torch.bool)], 1)
    clean = fused_tdpo_loss(**call, shift=shift, backend=backend)
    want = gradients(clean.loss, call["hidden"], call["head"])
    dirty = {n: torch.where(used[..., None], call[n].detach(), poison) for n in ("hidden", "ref_hidden")}
    dirty["hidden"].requires_grad_()
    out = fused_tdpo_loss(**call | dirty, shift=shift, backend=backend)
    fields_equal(out, clean)
    got = gradients(out.loss, dirty["hidden"], call["head"])
    close(got, want)
    assert got[0][~used].eq(0).all() and got[0][used].ne(0).any(-1).all()


@backends
def test_statistics_are_zero_where_ignored(backend: str):
    call = batch(torch.float32)
    stats = token_stats(**call, extras=EXTRAS, backend=backend)
    ignored = call["labels"] == -100
    for x in (stats.logp, stats.ref_logp, stats.kl, *stats.extras.values()):
        assert x[ignored].eq(0).all()
    assert stats.kl[~ignored].gt(0).all() and stats.logp[~ignored].lt(0).all()


@backends
def test_ignore_index_may_be_a_token(backend: str):
    call = batch()
    zeros = torch.where(call["labels"] == 0, 1, call["labels"])
    a = fused_tdpo_loss(**call | {"labels": zeros}, backend=backend)
    b = fused_tdpo_loss(**call | {"labels": torch.where(zeros == -100, 0, zeros)}, ignore_index=0, backend=backend)
    fields_equal(a, b)


@backends
@pytest.mark.parametrize("shift", [True, False])
def test_ignore_index_none_is_every_label(backend: str, shift: bool):
    call = batch() | {"labels": torch.randint(0, V, (2 * P, L))}
    a, b = (fused_tdpo_loss(**call, shift=shift, ignore_index=i, backend=backend) for i in (None, -100))
    fields_equal(a, b)
    close(gradients(a.loss, call["head"]), gradients(b.loss, call["head"]))


@backends
def test_int32_labels(backend: str):
    call = batch()
    fields_equal(
        fused_tdpo_loss(**call, backend=backend),
        fused_tdpo_loss(**call | {"labels": call["labels"].int()}, backend=backend),
    )


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_all_ignored_is_log_2_and_zero_gradients(backend: str, dtype: torch.dtype, packed: bool):
    call = batch(dtype) | {"labels": torch.full((2 * P, L), -100)}
    call = pack(call, [L, 2, 0, L]) if packed else call
    bias = torch.zeros(V, dtype=dtype, requires_grad=True)
    weight = call["head"]
    out = fused_tdpo_loss(**call | {"head": LMHead(weight, bias)}, backend=backend)
    assert out.loss == torch.tensor(math.log(2), dtype=out.loss.dtype)
    assert all(getattr(out, f).eq(0).all() for f in PAIR_FIELDS)
    assert all(g is not None and g.eq(0).all() for g in gradients(out.loss, call["hidden"], weight, bias))


@backends
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("ignore_index", [-100, None])
@pytest.mark.parametrize("packed", [False, True])
def test_no_rows_at_all(backend: str, shift: bool, ignore_index: int | None, packed: bool):
    call = batch()
    leaves = call["hidden"], call["head"]
    empty = {n: call[n][:, :0] for n in ("hidden", "ref_hidden", "labels")}
    if packed:
        empty = {n: x.flatten(0, 1) for n, x in empty.items()}
        empty["cu_seqlens"] = torch.zeros(2 * P + 1, dtype=torch.int32)
    options = dict(shift=shift, ignore_index=ignore_index, backend=backend)
    out = fused_tdpo_loss(**call | empty, **options)
    assert out.loss == math.log(2)
    assert all(g is not None and g.eq(0).all() for g in gradients(out.loss, *leaves))
    assert token_stats(**call | empty, **options, extras=EXTRAS).extras["entropy"].numel() == 0


def test_one_hidden_state_per_sequence_has_nothing_to_predict_when_shifted():
    call = batch() | {"labels": torch.randint(0, V, (2 * P, L))}
    call |= {name: call[name][:, :1] for name in ("hidden", "ref_hidden", "labels")}
    assert fused_tdpo_loss(**call).loss == math.log(2)
    assert fused_tdpo_loss(**call, shift=False).loss != math.log(2)


def test_pairs_are_chosen_first_then_rejected():
    call = batch()
    swapped = call | {n: call[n].roll(P, 0) for n in ("hidden", "ref_hidden", "labels")}
    a, b = fused_tdpo_loss(**call), fused_tdpo_loss(**swapped)
    close(a.chosen_rewards, b.rejected_rewards)
    close(a.ref_rejected_logps, b.ref_chosen_logps)


# --- heads and layouts -----------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("bias", [True, False])
def test_tensor_linear_and_lm_head_agree(backend: str, bias: bool):
    call = batch()
    linear, ref_linear = nn.Linear(D, V, bias).double(), nn.Linear(E, V, bias).double()
    as_heads = dict(head=LMHead(linear.weight, linear.bias), ref_head=LMHead(ref_linear.weight, ref_linear.bias))
    a = fused_tdpo_loss(**call | dict(head=linear, ref_head=ref_linear), backend=backend)
    b = fused_tdpo_loss(**call | as_heads, backend=backend)
    fields_equal(a, b)
    parameters = [x for x in (linear.weight, linear.bias) if x is not None]
    close(gradients(a.loss, *parameters), gradients(b.loss, *parameters))
    if not bias:
        fields_equal(a, fused_tdpo_loss(**call | dict(head=linear.weight, ref_head=ref_linear.weight), backend=backend))


@backends
def test_head_is_softcap_scale_and_bias_in_that_order(backend: str):
    call = batch()
    weight, bias = call["head"], torch.randn(V, dtype=torch.float64, requires_grad=True)
    ref_bias = torch.randn(V, dtype=torch.float64)
    heads = dict(head=LMHead(weight, bias, 0.7, 3.0), ref_head=LMHead(call["ref_head"], ref_bias, -1.3, 2.0))
    stats = token_stats(**call | heads, shift=False, backend=backend)
    z = 3.0 * torch.tanh(0.7 * (F.linear(call["hidden"], weight) + bias) / 3.0)
    r = 2.0 * torch.tanh(-1.3 * (F.linear(call["ref_hidden"], call["ref_head"]) + ref_bias) / 2.0)
    want = plain_stats(z, r, call["labels"])
    close((stats.logp, stats.ref_logp, stats.kl), want)
    leaves = call["hidden"], weight, bias
    close(gradients((stats.logp - 2 * stats.kl).sum(), *leaves), gradients((want[0] - 2 * want[2]).sum(), *leaves))


STORAGES = {
    "transposed": lambda x: x.detach().transpose(0, -1).contiguous().transpose(0, -1),
    "every second row": lambda x: torch.stack([x.detach(), torch.full_like(x, math.nan)], 1).flatten(0, 1)[::2],
    "every second column": lambda x: torch.stack([x.detach(), torch.full_like(x, math.nan)], -1).flatten(-2)[..., ::2],
    "slice of wider rows": lambda x: torch.cat([x.detach(), torch.full_like(x, math.nan)], -1)[..., : x.shape[-1]],
}


@backends
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", ["hidden", "head", "ref_hidden", "ref_head", "labels"])
def test_strides_do_not_matter(backend: str, storage: str, name: str):
    call = batch()
    if name == "labels" and storage in ("every second row", "every second column", "slice of wider rows"):
        changed = torch.stack([call[name], torch.full_like(call[name], V + 9)], -1).flatten(-2)[..., ::2]
    else:
        changed = STORAGES[storage](call[name])
    assert not changed.is_contiguous()
    if name in ("hidden", "head"):
        changed.requires_grad_()
    other = call | {name: changed}
    a, b = (fused_tdpo_loss(**x, backend=backend) for x in (call, other))
    fields_equal(a, b)
    leaves = ("hidden", "head")
    close(gradients(a.loss, *(call[n] for n in leaves)), gradients(b.loss, *(other[n] for n in leaves)))


@backends
def test_expanded_tensors(backend: str):
    call = batch()
    one, column = call["hidden"].detach()[:1].clone(), call["head"].detach()[:, :1].clone()
    one.requires_grad_(), column.requires_grad_()
    expanded = call | {"hidden": one.expand(2 * P, L, D), "head": column.expand(V, D)}
    expanded["ref_hidden"] = call["ref_hidden"][:1].expand(2 * P, L, E)
    copied = {n: x.contiguous() for n, x in expanded.items()}
    a, b = (fused_tdpo_loss(**x, backend=backend) for x in (expanded, copied))
    fields_equal(a, b)
    close(gradients(a.loss, one, column), gradients(b.loss, one, column))


@backends
def test_expanded_leaf_head(backend: str):
    """A leaf that is itself a stride-0 view still gets a whole gradient."""
    call = batch()
    head = call["head"].detach()[:, :1].expand(V, D).detach().requires_grad_()
    copied = head.detach().contiguous().requires_grad_()
    a, b = (gradients(fused_tdpo_loss(**call | {"head": h}, backend=backend).loss, h) for h in (head, copied))
    close(a, b)


@backends
@pytest.mark.parametrize("detach", [True, False])
def test_tied_reference_head(backend: str, detach: bool):
    """Same tensor on both sides: the policy's gradient only."""
    call = batch()
    want, _ = plain_loss(call | {"ref_hidden": call["hidden"].detach() + 0.5, "ref_head": call["head"].detach()})
    tied = call | {"ref_hidden": call["hidden"] + 0.5, "ref_head": call["head"]}
    if detach:
        tied |= {n: tied[n].detach() for n in ("ref_hidden", "ref_head")}
    out = fused_tdpo_loss(**tied, reduction="none", backend=backend)
    close(out.loss, want)
    leaves = call["hidden"], call["head"]
    close(gradients(out.loss.sum(), *leaves), gradients(want.sum(), *leaves))


@backends
def test_policy_equal_to_reference_is_log_2(backend: str):
    call = batch()
    out = fused_tdpo_loss(**call | {"ref_hidden": call["hidden"], "ref_head": call["head"]}, backend=backend)
    assert out.loss == math.log(2)
    assert out.chosen_kl.eq(0).all() and out.rejected_kl.eq(0).all()


@backends
def test_reference_may_have_its_own_dtype(backend: str):
    call = batch(torch.float32)
    ref = {n: call[n].bfloat16() for n in ("ref_hidden", "ref_head")}
    a, b = (fused_tdpo_loss(**call | x, backend=backend) for x in (ref, {n: x.float() for n, x in ref.items()}))
    for f in fields(a):
        close(getattr(a, f.name), getattr(b, f.name), 1e-5)


INFERENCE = [["labels"], ["head"], ["hidden"], ["ref_hidden", "ref_head"], ["labels", "head", "ref_hidden", "ref_head"]]


@backends
@pytest.mark.parametrize("names", INFERENCE, ids="+".join)
@pytest.mark.parametrize("whole", [False, True], ids=["ignored", "whole"])
def test_what_needs_no_gradient_may_come_from_inference_mode(backend: str, names: list[str], whole: bool):
    """A collator, a frozen head, a frozen backbone, the reference: any of them may run under inference mode."""
    call = batch()
    if whole:
        call |= {"labels": torch.randint(0, V, (2 * P, L))}
    with torch.inference_mode():
        frozen = {name: call[name].detach().clone() for name in names}
    leaves = [call[name] for name in ("hidden", "head") if name not in names]
    options = dict(shift=not whole, backend=backend)
    a, b = fused_tdpo_loss(**call, **options), fused_tdpo_loss(**call | frozen, **options)
    assert torch.equal(a.loss, b.loss)
    close(gradients(b.loss, *leaves), gradients(a.loss, *leaves), 0)


# --- the module, and names -------------------------------------------------------------------------------------------


@variants
def test_module_is_the_function(options: dict):
    call = batch()
    options = options | dict(beta=0.2, shift=False, reduction="sum", memory_budget=0, backend="naive")
    module = TDPOLoss(**options)
    fields_equal(module(*call.values()), fused_tdpo_loss(**call, **options))
    assert not list(module.parameters()) and not module.state_dict()
    assert "beta=0.2" in repr(module) and "tdpo" in repr(module)


def test_module_takes_offsets_and_survives_pickling():
    padded, lengths = ragged()
    call = pack(padded, lengths)
    module = pickle.loads(pickle.dumps(TDPOLoss(variant="tdpo1")))
    fields_equal(module(**call), fused_tdpo_loss(**call, variant="tdpo1"))


def test_backends_agree_and_auto_is_one_of_them():
    call = batch()
    outs = {name: fused_tdpo_loss(**call, backend=name) for name in runnable()}
    auto = fused_tdpo_loss(**call)
    for out in outs.values():
        fields_equal(out, outs["naive"])
    assert any(all(torch.equal(getattr(auto, f), getattr(out, f)) for f in PAIR_FIELDS) for out in outs.values())


@backends
def test_a_named_backend_is_the_one_that_runs(backend: str, monkeypatch: pytest.MonkeyPatch):
    ran = []
    for name, module in BACKENDS.items():
        forward = module.forward
        monkeypatch.setattr(module, "forward", lambda *a, _n=name, _f=forward: (ran.append(_n), _f(*a))[1])
    fused_tdpo_loss(**batch(), backend=backend)
    assert ran == [backend]


@pytest.mark.parametrize("budget", [0, 1, 1500, 10**6, 2**60])
def test_budget_is_no_matter_to_the_numbers(budget: int):
    call = batch()
    leaves = call["hidden"], call["head"]
    a, b = (fused_tdpo_loss(**call, memory_budget=x) for x in (budget, 2**29))
    assert all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    close(gradients(a.loss, *leaves), gradients(b.loss, *leaves))


@backends
def test_extras_with_a_ruled_out_vocabulary(backend: str):
    call = batch()
    bias = torch.zeros(V, dtype=torch.float64)
    bias[20:] = -math.inf
    head = LMHead(call["head"], bias)
    labels = torch.where(call["labels"] == -100, -100, call["labels"] % 20)
    got = token_stats(**call | dict(head=head, labels=labels), shift=False, extras=EXTRAS, backend=backend).extras
    short = token_stats(**call | dict(head=call["head"][:20], ref_head=call["ref_head"][:20], labels=labels),
                        shift=False, extras=EXTRAS, backend="naive").extras  # fmt: skip
    close(got["entropy"], short["entropy"])
    close(got["is_argmax"], short["is_argmax"])


@backends
def test_mean_logit_with_a_ruled_out_vocabulary_is_minus_infinity(backend: str):
    call = batch()
    bias = torch.zeros(V, dtype=torch.float64)
    bias[-1] = -math.inf
    labels = torch.where(call["labels"] == -100, -100, call["labels"] % 20)
    changes = dict(head=LMHead(call["head"], bias), labels=labels)
    got = token_stats(**call | changes, extras=("mean_logit",), backend=backend).extras["mean_logit"]
    assert got[:, 1:][labels[:, 1:] != -100].eq(-math.inf).all()


def test_lm_head_can_be_copied_with_changes():
    head = LMHead(torch.zeros(V, D))
    assert replace(head, softcap=3.0).softcap == 3.0 and head.softcap is None


def test_what_holds_tensors_is_equal_to_itself_only():
    """The equality of a dataclass asks tensors for one truth value, and raises."""
    call = batch()
    head = LMHead(call["head"])
    for x in (head, token_stats(**call), fused_tdpo_loss(**call)):
        assert x == x and x != replace(x) and x != "x" and x in [x] and {x: 1}[x] == 1


def test_every_dataclass_with_a_tensor_has_no_equality_of_its_own():
    held = [x for x in vars(types).values() if isinstance(x, type) and is_dataclass(x)]
    assert [x.__name__ for x in held if "__eq__" in vars(x)] == ["Needs"]


def test_a_backend_that_cannot_run_here_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    told = {"naive": "available: here", "fused": "needs CUDA: got cpu"}
    monkeypatch.setattr("runnable.availability", lambda device: told)
    here, there = backend_params()
    assert (here.values, list(here.marks)) == (("naive",), [])
    assert there.values == ("fused",) and there.marks[0].kwargs["reason"] == "fused: needs CUDA: got cpu"
    assert runnable() == ["naive"]


def test_every_backend_is_a_parameter():
    assert [p.values[0] for p in backend_params()] == list(BACKENDS)
