"""Which rows count: packing, shifting, ignoring, and nothing at all."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from batches import EXTRAS, L, P, V, close, fields_equal, grads, pack, ragged, ragged_batch
from runnable import backends

from tdpo_kernels import LMHead, TDPOOutput, fused_tdpo_loss, token_stats

pytestmark = pytest.mark.usefixtures("tiles_of_5_by_16")


PAIR_FIELDS = [f.name for f in fields(TDPOOutput)][1:-1]
variants = pytest.mark.parametrize("options", [{"variant": "tdpo1"}, {"alpha": 0.7}], ids=str)


@backends
@variants
@pytest.mark.parametrize("shift", [True, False])
def test_padded_is_packed(backend: str, options: dict, shift: bool):
    padded, lengths = ragged()
    call = pack(padded, lengths)
    leaves = padded["hidden"], padded["head"]
    a, b = (fused_tdpo_loss(**x, **options, shift=shift, reduction="none", backend=backend) for x in (padded, call))
    fields_equal(replace(a, tokens=b.tokens), b)  # whose shapes differ
    close(grads(a.loss.sum(), *leaves), grads(b.loss.sum(), *leaves))
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
    call = pack(ragged_batch() | {"labels": torch.randint(0, V, (2 * P, L))}, lengths)
    out = fused_tdpo_loss(**call, backend=backend, reduction="none")
    sums = torch.cat([out.chosen_kl, out.rejected_kl])
    assert torch.equal(sums == 0, torch.tensor(lengths) <= 1)
    grads(out.loss.sum(), call["hidden"])


@backends
@pytest.mark.parametrize("packed", [False, True])
def test_shift_never_crosses_a_boundary(backend: str, packed: bool):
    """Even with every label counting, the last hidden state of a sequence predicts nothing."""
    call = ragged_batch() | {"labels": torch.randint(0, V, (2 * P, L))}
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
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("said", [dict(ignore_index=None), dict(labels=torch.int32)], ids=str)
def test_labels_that_all_count_may_be_said_so_and_be_int32(backend: str, shift: bool, said: dict):
    call = ragged_batch() | {"labels": torch.randint(0, V, (2 * P, L))}
    other = call | said | {"labels": call["labels"].to(said.get("labels", torch.int64))}
    a, b = (fused_tdpo_loss(**x, shift=shift, backend=backend) for x in (call, other))
    fields_equal(a, b)
    close(grads(a.loss, call["head"]), grads(b.loss, call["head"]))


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_all_ignored_is_log_2_and_zero_grads(backend: str, dtype: torch.dtype, packed: bool):
    call = ragged_batch(dtype) | {"labels": torch.full((2 * P, L), -100)}
    call = pack(call, [L, 2, 0, L]) if packed else call
    bias = torch.zeros(V, dtype=dtype, requires_grad=True)
    weight = call["head"]
    out = fused_tdpo_loss(**call | {"head": LMHead(weight, bias)}, backend=backend)
    assert out.loss == torch.tensor(math.log(2), dtype=out.loss.dtype)
    assert all(getattr(out, f).eq(0).all() for f in PAIR_FIELDS)
    assert all(g is not None and g.eq(0).all() for g in grads(out.loss, call["hidden"], weight, bias))


@backends
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("ignore_index", [-100, None])
@pytest.mark.parametrize("packed", [False, True])
def test_no_rows_at_all(backend: str, shift: bool, ignore_index: int | None, packed: bool):
    call = ragged_batch()
    leaves = call["hidden"], call["head"]
    empty = {n: call[n][:, :0] for n in ("hidden", "ref_hidden", "labels")}
    if packed:
        empty = {n: x.flatten(0, 1) for n, x in empty.items()}
        empty["cu_seqlens"] = torch.zeros(2 * P + 1, dtype=torch.int32)
    options = dict(shift=shift, ignore_index=ignore_index, backend=backend)
    out = fused_tdpo_loss(**call | empty, **options)
    assert out.loss == math.log(2)
    assert all(g is not None and g.eq(0).all() for g in grads(out.loss, *leaves))
    assert token_stats(**call | empty, **options, extras=EXTRAS).extras["entropy"].numel() == 0


def test_one_hidden_state_per_sequence_has_nothing_to_predict_when_shifted():
    call = ragged_batch() | {"labels": torch.randint(0, V, (2 * P, L))}
    call |= {name: call[name][:, :1] for name in ("hidden", "ref_hidden", "labels")}
    assert fused_tdpo_loss(**call).loss == math.log(2)
    assert fused_tdpo_loss(**call, shift=False).loss != math.log(2)
