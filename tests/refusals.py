"""Calls that must be refused: what is changed of a good one, the error's type, and words of its message."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from tdpo_kernels import LMHead

P, L, D, E, V = 2, 5, 8, 6, 11


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
    "odd row count": (dict(hidden=torch.randn(3, L, D)), ValueError, "hidden | (3, 5, 8) | 3 sequences | 2P"),
    "no rows": (dict(hidden=torch.randn(0, L, D)), ValueError, "hidden | (0, 5, 8) | 0 sequences | 2P"),
    "2-D hidden unpacked": (dict(hidden=torch.randn(N, D)), ValueError, "hidden | (20, 8) | (2P, L, D) | cu_seqlens"),
    "4-D hidden": (dict(hidden=torch.randn(1, 4, L, D)), ValueError, "hidden | (1, 4, 5, 8) | (2P, L, D)"),
    "V mismatch": (
        dict(ref_head=torch.randn(V + 5, E)),
        ValueError,
        "ref_head.weight | (16, 6) | V = 11 | head.weight (11, 8)",
    ),  # fmt: skip
    "D mismatch": (dict(head=torch.randn(V, D + 1)), ValueError, "head.weight | (11, 9) | (V, 8) | hidden (4, 5, 8)"),
    "E mismatch": (
        dict(ref_head=torch.randn(V, E + 1)),
        ValueError,
        "ref_head.weight | (11, 7) | (V, 6) | ref_hidden (4, 5, 6)",
    ),  # fmt: skip
    "head transposed": (dict(head=torch.randn(D, V)), ValueError, "head.weight | (8, 11) | (V, 8)"),
    "1-D head": (dict(head=torch.randn(V)), ValueError, "head.weight | (11,) | (V, D)"),
    "empty vocabulary": (dict(head=torch.randn(0, D)), ValueError, "head.weight | (0, 8) | V >= 1"),
    "labels shorter": (
        dict(labels=torch.zeros(4, L - 1).long()),
        ValueError,
        "labels | (4, 4) | (4, 5) | hidden (4, 5, 8)",
    ),  # fmt: skip
    "labels flat": (dict(labels=torch.zeros(N).long()), ValueError, "labels | (20,) | (4, 5)"),
    "ref_hidden rows": (dict(ref_hidden=torch.randn(2, L, E)), ValueError, "ref_hidden | (2, 5, 6) | (4, 5, E)"),
    "0-d ref_hidden": (dict(ref_hidden=torch.tensor(1.0)), ValueError, "ref_hidden | () | (4, 5, E)"),
    "0-d labels": (dict(labels=torch.tensor(1)), ValueError, "labels | () | (4, 5)"),
    "0-d head": (dict(head=torch.tensor(1.0)), ValueError, "head.weight | () | (V, D)"),
    "0-d hidden": (dict(hidden=torch.tensor(1.0)), ValueError, "hidden | () | (2P, L, D)"),
    "zero-width ref_hidden": (
        dict(ref_hidden=torch.randn(4, L, 0), ref_head=torch.randn(V, 0)),
        ValueError,
        "ref_hidden | (4, 5, 0) | at least one hidden dimension",
    ),  # fmt: skip
    "ref_hidden flat": (dict(ref_hidden=torch.randn(N, E)), ValueError, "ref_hidden | (20, 6) | (4, 5, E)"),
    "bias shape": (dict(head=LMHead(W, torch.zeros(V + 1))), ValueError, "head.bias | (12,) | (11,)"),
    "bias of one": (dict(head=LMHead(W, torch.zeros(1))), ValueError, "head.bias | (1,) | (11,)"),
    "bias 2-D": (dict(head=LMHead(W, torch.zeros(1, V))), ValueError, "head.bias | (1, 11) | (11,)"),
    "ref bias shape": (
        dict(ref_head=LMHead(torch.randn(V, E), torch.zeros(3))),
        ValueError,
        "ref_head.bias | (3,) | (11,)",
    ),  # fmt: skip
}
DTYPES = {
    "int hidden": (dict(hidden=torch.zeros(4, L, D).int()), TypeError, "hidden | int32 | float32"),
    "complex hidden": (dict(hidden=torch.zeros(4, L, D).cfloat()), TypeError, "hidden | complex64 | float32"),
    "int ref_hidden": (dict(ref_hidden=torch.zeros(4, L, E).int()), TypeError, "ref_hidden | int32 | float32"),
    "int8 head": (dict(head=torch.zeros(V, D).to(torch.int8)), TypeError, "head.weight | int8 | float32"),
    "float8 head": (dict(head=torch.zeros(V, D).to(torch.float8_e4m3fn)), TypeError, "head.weight | float8 | bfloat16"),
    "float labels": (dict(labels=torch.zeros(4, L)), TypeError, "labels | float32 | int64"),
    "bool labels": (dict(labels=torch.zeros(4, L).bool()), TypeError, "labels | bool | int64"),
    "uint8 labels": (dict(labels=torch.zeros(4, L).byte()), TypeError, "labels | uint8 | int64"),
    "bf16 hidden, fp32 head": (
        dict(hidden=torch.randn(4, L, D).bfloat16()),
        TypeError,
        "head.weight: got (11, 8) float32 | wanted bfloat16 as hidden (4, 5, 8) bfloat16 | autocast",
    ),  # fmt: skip
    "fp32 hidden, bf16 head": (
        dict(head=W.bfloat16()),
        TypeError,
        "head.weight: got (11, 8) bfloat16 | wanted float32 as hidden (4, 5, 8) float32 | autocast",
    ),  # fmt: skip
    "bf16 ref_hidden": (
        dict(ref_hidden=torch.randn(4, L, E).bfloat16()),
        TypeError,
        "ref_head.weight: got (11, 6) float32 | wanted bfloat16 as ref_hidden (4, 5, 6) bfloat16",
    ),  # fmt: skip
    "bias dtype": (dict(head=LMHead(W, torch.zeros(V).double())), TypeError, "head.bias | float64 | float32"),
}
DEVICES = {
    "hidden on meta": (dict(hidden=torch.empty(4, L, D, device="meta")), ValueError, "hidden | meta | device"),
    "head on meta": (dict(head=torch.empty(V, D, device="meta")), ValueError, "head.weight | meta | cpu | hidden"),
    "ref_hidden on meta": (dict(ref_hidden=torch.empty(4, L, E, device="meta")), ValueError, "ref_hidden | meta | cpu"),
    "ref_head on meta": (dict(ref_head=torch.empty(V, E, device="meta")), ValueError, "ref_head.weight | meta | cpu"),
    "labels on meta": (dict(labels=torch.empty(4, L, device="meta").long()), ValueError, "labels | meta | cpu"),
    "bias on meta": (dict(head=LMHead(W, torch.empty(V, device="meta"))), ValueError, "head.bias | meta | cpu"),
}
KINDS = {
    "list hidden": (dict(hidden=[[1.0]]), TypeError, "hidden | list | tensor"),
    "numpy hidden": (dict(hidden=np.zeros((4, L, D), np.float32)), TypeError, "hidden | ndarray | tensor"),
    "None ref_hidden": (dict(ref_hidden=None), TypeError, "ref_hidden | None | tensor"),
    "list labels": (dict(labels=[1, 2]), TypeError, "labels | list | tensor"),
    "head is a module": (
        dict(head=nn.Sequential(nn.Linear(D, V))),
        TypeError,
        "head | Sequential | nn.Linear | LMHead",
    ),  # fmt: skip
    "head is None": (dict(head=None), TypeError, "head | None | nn.Linear"),
    "ref_head is a tuple": (dict(ref_head=(W, None)), TypeError, "ref_head | tuple | LMHead"),
    "LMHead of an nn.Linear": (dict(head=LMHead(nn.Linear(D, V))), TypeError, "head.weight | Linear | tensor"),
    "bias is a float": (dict(head=LMHead(W, 0.5)), TypeError, "head.bias | 0.5 | tensor"),
    "sparse head": (dict(head=W.to_sparse()), TypeError, "head.weight | sparse | dense"),
    "sparse labels": (dict(labels=torch.zeros(4, L).long().to_sparse()), TypeError, "labels | sparse | dense"),
    "DTensor head": (dict(head=dtensor(V, D)), TypeError, "head.weight | LooksLikeDTensor | plain"),
    "DTensor hidden": (dict(hidden=dtensor(4, L, D)), TypeError, "hidden | LooksLikeDTensor | plain"),
}
HEADS = {
    "softcap 0": (dict(head=LMHead(W, softcap=0.0)), ValueError, "head.softcap | 0.0 | > 0 | None"),
    "softcap negative": (dict(head=LMHead(W, softcap=-30.0)), ValueError, "head.softcap | -30.0 | > 0"),
    "softcap nan": (dict(head=LMHead(W, softcap=math.nan)), ValueError, "head.softcap | nan | finite"),
    "softcap text": (dict(head=LMHead(W, softcap="30")), TypeError, "head.softcap | '30' | number"),
    "softcap True": (dict(head=LMHead(W, softcap=True)), TypeError, "head.softcap | True | number"),
    "logit_scale inf": (dict(head=LMHead(W, logit_scale=math.inf)), ValueError, "head.logit_scale | inf | finite"),
    "logit_scale tensor": (
        dict(head=LMHead(W, logit_scale=torch.ones(()))),
        TypeError,
        "head.logit_scale | () | number",
    ),  # fmt: skip
    "logit_scale None": (dict(head=LMHead(W, logit_scale=None)), TypeError, "head.logit_scale | None | number"),
    "logit_scale 10^400": (
        dict(head=LMHead(W, logit_scale=10**400)),
        ValueError,
        "head.logit_scale | int of 1329 bits | finite",
    ),  # fmt: skip
    "softcap -10^9999": (dict(head=LMHead(W, softcap=-(10**9999))), ValueError, "head.softcap | bits | finite"),
    "softcap 1e-300": (dict(head=LMHead(W, softcap=1e-300)), ValueError, "head.softcap | 1e-300 | float32"),
    "softcap 1e300": (dict(head=LMHead(W, softcap=1e300)), ValueError, "head.softcap | 1e+300 | float32"),
    "logit_scale 1e39": (dict(head=LMHead(W, logit_scale=1e39)), ValueError, "head.logit_scale | 1e+39 | float32"),
    "ref logit_scale": (
        dict(ref_head=LMHead(torch.randn(V, E), logit_scale=-1e39)),
        ValueError,
        "ref_head.logit_scale | -1e+39 | float32",
    ),  # fmt: skip
    "ref softcap": (dict(ref_head=LMHead(torch.randn(V, E), softcap=-1.0)), ValueError, "ref_head.softcap | -1.0"),
}
LABELS = {
    "label = V": (relabelled(V), ValueError, "labels | 1 label | [0, 11) | 11 at flat position 8 | ignore_index"),
    "label negative": (relabelled(-1), ValueError, "labels | [0, 11) | -1 at flat position 8 | ignore_index"),
    "label huge": (relabelled(2**40), ValueError, "labels | [0, 11) | 1099511627776"),
    "other ignore_index": (relabelled(-100) | {"ignore_index": -1}, ValueError, "labels | -100 at flat position 8"),
    "no ignore_index": (relabelled(-100) | {"ignore_index": None}, ValueError, "labels | -100 at flat position 8"),
    "no pack": (
        relabelled(-100) | {"ignore_index": None, "shift": False},
        ValueError,
        "labels | -100 at flat position 8",
    ),  # fmt: skip
    "int32 label": ({"labels": relabelled(V)["labels"].int()}, ValueError, "labels | 11 at flat position 8"),
}
OFFSETS = {
    "not from 0": (packed(offsets(1, 5, 10, 15, N)), ValueError, "cu_seqlens | from 1 to 20 | 0 to N = 20"),
    "not to N": (packed(offsets(0, 5, 10, 15, N - 1)), ValueError, "cu_seqlens | from 0 to 19 | 0 to N = 20"),
    "past N": (packed(offsets(0, 5, 10, 15, N + 1)), ValueError, "cu_seqlens | from 0 to 21 | 0 to N = 20"),
    "decreasing": (packed(offsets(0, 12, 10, 15, N)), ValueError, "cu_seqlens | 12 to 10 | index 2 | never decrease"),
    "negative inside": (packed(offsets(0, -3, 10, 15, N)), ValueError, "cu_seqlens | 0 to -3 | index 1"),
    "float": (packed(offsets(0, 5, 10, 15, N).float()), TypeError, "cu_seqlens | float32 | int32 | int64"),
    "int16": (packed(offsets(0, 5, 10, 15, N).short()), TypeError, "cu_seqlens | int16 | int64"),
    "odd count": (packed(offsets(0, 5, 15, N)), ValueError, "cu_seqlens | 3 sequences | 2P"),
    "no sequence": (packed(offsets(0)), ValueError, "cu_seqlens | 0 sequences | 2P"),
    "empty": (packed(offsets()), ValueError, "cu_seqlens | (0,)"),
    "2-D": (packed(offsets(0, 5, 10, 15, N)[None]), ValueError, "cu_seqlens | (1, 5) | (S + 1,)"),
    "list": (packed([0, 5, 10, 15, N]), TypeError, "cu_seqlens | list | tensor"),
    "with 3-D hidden": (
        dict(cu_seqlens=offsets(0, 5, 10, 15, N)),
        ValueError,
        "hidden | (4, 5, 8) | (N, D) | cu_seqlens",
    ),  # fmt: skip
    "on meta": (packed(offsets(0, 5, 10, 15, N).to("meta")), ValueError, "cu_seqlens | meta | cpu"),
}
OPTIONS = {
    "ignore_index float": (dict(ignore_index=-100.0), TypeError, "ignore_index | -100.0 | int"),
    "ignore_index bool": (dict(ignore_index=True), TypeError, "ignore_index | True | int"),
    "ignore_index 2^70": (dict(ignore_index=2**70), ValueError, "ignore_index | int of 71 bits | int64"),
    "ignore_index below int64": (dict(ignore_index=-(2**63) - 1), ValueError, "ignore_index | int64"),
    "memory_budget -10^9999": (dict(memory_budget=-(10**9999)), ValueError, "memory_budget | bits | bytes >= 0"),
    "shift int": (dict(shift=1), TypeError, "shift | 1 | True or False"),
    "shift None": (dict(shift=None), TypeError, "shift | None | True or False"),
    "memory_budget negative": (dict(memory_budget=-1), ValueError, "memory_budget | -1 | bytes >= 0"),
    "memory_budget float": (dict(memory_budget=1e9), ValueError, "memory_budget | float | bytes >= 0"),
    "memory_budget text": (dict(memory_budget="1GB"), ValueError, "memory_budget | '1GB' | bytes >= 0"),
    "memory_budget None": (dict(memory_budget=None), ValueError, "memory_budget | None | bytes >= 0"),
    "memory_budget True": (dict(memory_budget=True), ValueError, "memory_budget | True | bytes >= 0"),
    "backend unknown": (dict(backend="cuda"), ValueError, "backend | 'cuda' | 'auto' | 'tiled' | 'naive'"),
    "backend None": (dict(backend=None), ValueError, "backend | None | 'auto'"),
}
LOSS = {
    "beta 0": (dict(beta=0.0), ValueError, "beta | 0.0 | > 0"),
    "beta negative": (dict(beta=-0.1), ValueError, "beta | -0.1 | > 0"),
    "beta nan": (dict(beta=math.nan), ValueError, "beta | nan | finite"),
    "beta inf": (dict(beta=math.inf), ValueError, "beta | inf | finite"),
    "beta 10^400": (dict(beta=10**400), ValueError, "beta | int of 1329 bits | finite"),
    "beta -10^9999": (dict(beta=-(10**9999)), ValueError, "beta | bits | finite"),
    "alpha 10^400": (dict(alpha=10**400), ValueError, "alpha | int of 1329 bits | finite"),
    "alpha 10^9999 with tdpo1": (dict(variant="tdpo1", alpha=10**9999), ValueError, "alpha | bits | tdpo1"),
    "beta text": (dict(beta="0.1"), TypeError, "beta | '0.1' | number"),
    "beta tensor": (dict(beta=torch.tensor(0.1)), TypeError, "beta | number"),
    "alpha negative": (dict(alpha=-0.5), ValueError, "alpha | -0.5 | >= 0"),
    "alpha nan": (dict(alpha=math.nan), ValueError, "alpha | nan | finite"),
    "alpha text": (dict(alpha="half"), TypeError, "alpha | 'half' | number"),
    "alpha with tdpo1": (dict(variant="tdpo1", alpha=0.5), ValueError, "alpha | 0.5 | tdpo1 | leave it out"),
    "alpha 0 with tdpo1": (dict(variant="tdpo1", alpha=0), ValueError, "alpha | tdpo1"),
    "variant unknown": (dict(variant="dpo"), ValueError, "variant | 'dpo' | 'tdpo1' | 'tdpo2'"),
    "variant case": (dict(variant="TDPO2"), ValueError, "variant | 'TDPO2' | 'tdpo2'"),
    "reduction unknown": (dict(reduction="avg"), ValueError, "reduction | 'avg' | 'mean' | 'sum' | 'none'"),
    "reduction None": (dict(reduction=None), ValueError, "reduction | None | 'none'"),
}
INPUTS = (SHAPES, DTYPES, DEVICES, KINDS, HEADS, LABELS, OFFSETS)
ONLY_PAIRS = {"0-d hidden", "odd row count", "no rows", "2-D hidden unpacked", "4-D hidden", "odd count", "no sequence"}
