"""Calls that must be refused: what is changed of a good one, the error's type, and words of its message."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn, randn

from tdpo_kernels import LMHead

P, L, D, E, V = 2, 5, 8, 6, 11


class LooksLikeDTensor(torch.Tensor):
    """A DTensor needs a process group; this has the method that gives one away."""

    def full_tensor(self) -> torch.Tensor:
        raise AssertionError("nobody may gather behind the user's back")


def good() -> dict:
    gen = torch.Generator().manual_seed(0)

    shapes = dict(hidden=(2 * P, L, D), head=(V, D), ref_hidden=(2 * P, L, E), ref_head=(V, E))
    call = {name: randn(*shape, generator=gen) for name, shape in shapes.items()}
    return call | {"labels": torch.randint(0, V, (2 * P, L), generator=gen)}


def value(words: str, **changes: object) -> tuple[dict, type, str]:
    return changes, ValueError, words


def kind(words: str, **changes: object) -> tuple[dict, type, str]:
    return changes, TypeError, words


def packed(cu_seqlens: object) -> dict:
    call = good()
    rows = {name: call[name].flatten(0, 1) for name in ("hidden", "ref_hidden", "labels")}
    return rows | {"cu_seqlens": cu_seqlens}


def relabelled(value: int, *also: int) -> dict:
    """Return labels of which one, and others by their flat positions, have this value."""
    labels = good()["labels"]
    labels.view(-1)[[8, *also]] = value
    return {"labels": labels}


def offsets(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def dtensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).as_subclass(LooksLikeDTensor)


N = 2 * P * L
W = torch.randn(V, D)
SHAPES = {
    "odd row count": value("hidden | (3, 5, 8) | 3 sequences | 2P", hidden=randn(3, L, D)),
    "no rows": value("hidden | (0, 5, 8) | 0 sequences | 2P", hidden=randn(0, L, D)),
    "2-D hidden unpacked": value("hidden | (20, 8) | (2P, L, D) | cu_seqlens", hidden=randn(N, D)),
    "4-D hidden": value("hidden | (1, 4, 5, 8) | (2P, L, D)", hidden=randn(1, 4, L, D)),
    "V mismatch": value("ref_head.weight | (16, 6) | V = 11 | head.weight (11, 8)", ref_head=randn(V + 5, E)),
    "D mismatch": value("head.weight | (11, 9) | (V, 8) | hidden (4, 5, 8)", head=randn(V, D + 1)),
    "E mismatch": value("ref_head.weight | (11, 7) | (V, 6) | ref_hidden (4, 5, 6)", ref_head=randn(V, E + 1)),
    "head transposed": value("head.weight | (8, 11) | (V, 8)", head=randn(D, V)),
    "1-D head": value("head.weight | (11,) | (V, D)", head=randn(V)),
    "empty vocabulary": value("head.weight | (0, 8) | V >= 1", head=randn(0, D)),
    "labels shorter": value("labels | (4, 4) | (4, 5) | hidden (4, 5, 8)", labels=torch.zeros(4, L - 1).long()),
    "labels flat": value("labels | (20,) | (4, 5)", labels=torch.zeros(N).long()),
    "ref_hidden rows": value("ref_hidden | (2, 5, 6) | (4, 5, E)", ref_hidden=randn(2, L, E)),
    "0-d ref_hidden": value("ref_hidden | () | (4, 5, E)", ref_hidden=torch.tensor(1.0)),
    "0-d labels": value("labels | () | (4, 5)", labels=torch.tensor(1)),
    "0-d head": value("head.weight | () | (V, D)", head=torch.tensor(1.0)),
    "0-d hidden": value("hidden | () | (2P, L, D)", hidden=torch.tensor(1.0)),
    "zero-width ref_hidden": value(
        "ref_hidden | (4, 5, 0) | at least one hidden dimension", ref_hidden=randn(4, L, 0), ref_head=randn(V, 0)
    ),
    "zero-width hidden": value("hidden | (4, 5, 0) | at least one", hidden=randn(4, L, 0), head=randn(V, 0)),
    "ref_hidden flat": value("ref_hidden | (20, 6) | (4, 5, E)", ref_hidden=randn(N, E)),
    "bias shape": value("head.bias | (12,) | (11,)", head=LMHead(W, torch.zeros(V + 1))),
    "bias of one": value("head.bias | (1,) | (11,)", head=LMHead(W, torch.zeros(1))),
    "bias 2-D": value("head.bias | (1, 11) | (11,)", head=LMHead(W, torch.zeros(1, V))),
    "ref bias shape": value("ref_head.bias | (3,) | (11,)", ref_head=LMHead(randn(V, E), torch.zeros(3))),
}
DTYPES = {
    "int hidden": kind("hidden | int32 | float32", hidden=torch.zeros(4, L, D).int()),
    "complex hidden": kind("hidden | complex64 | float32", hidden=torch.zeros(4, L, D).cfloat()),
    "int ref_hidden": kind("ref_hidden | int32 | float32", ref_hidden=torch.zeros(4, L, E).int()),
    "int8 head": kind("head.weight | int8 | float32", head=torch.zeros(V, D).to(torch.int8)),
    "float8 head": kind("head.weight | float8 | bfloat16", head=torch.zeros(V, D).to(torch.float8_e4m3fn)),
    "float labels": kind("labels | float32 | int64", labels=torch.zeros(4, L)),
    "bool labels": kind("labels | bool | int64", labels=torch.zeros(4, L).bool()),
    "uint8 labels": kind("labels | uint8 | int64", labels=torch.zeros(4, L).byte()),
    "bf16 hidden, fp32 head": kind(
        "head.weight: got (11, 8) float32 | wanted bfloat16 as hidden (4, 5, 8) bfloat16 | autocast",
        hidden=randn(4, L, D).bfloat16(),
    ),
    "fp32 hidden, bf16 head": kind(
        "head.weight: got (11, 8) bfloat16 | wanted float32 as hidden (4, 5, 8) float32 | autocast", head=W.bfloat16()
    ),
    "bf16 ref_hidden": kind(
        "ref_head.weight: got (11, 6) float32 | wanted bfloat16 as ref_hidden (4, 5, 6) bfloat16",
        ref_hidden=randn(4, L, E).bfloat16(),
    ),
    "bias dtype": kind("head.bias | float64 | float32", head=LMHead(W, torch.zeros(V).double())),
}
DEVICES = {
    "hidden on meta": value("hidden | meta | device", hidden=torch.empty(4, L, D, device="meta")),
    "head on meta": value("head.weight | meta | cpu | hidden", head=torch.empty(V, D, device="meta")),
    "ref_hidden on meta": value("ref_hidden | meta | cpu", ref_hidden=torch.empty(4, L, E, device="meta")),
    "ref_head on meta": value("ref_head.weight | meta | cpu", ref_head=torch.empty(V, E, device="meta")),
    "labels on meta": value("labels | meta | cpu", labels=torch.empty(4, L, device="meta").long()),
    "bias on meta": value("head.bias | meta | cpu", head=LMHead(W, torch.empty(V, device="meta"))),
}
KINDS = {
    "list hidden": kind("hidden | list | tensor", hidden=[[1.0]]),
    "numpy hidden": kind("hidden | ndarray | tensor", hidden=np.zeros((4, L, D), np.float32)),
    "None ref_hidden": kind("ref_hidden | None | tensor", ref_hidden=None),
    "list labels": kind("labels | list | tensor", labels=[1, 2]),
    "head is a module": kind("head | Sequential | nn.Linear | LMHead", head=nn.Sequential(nn.Linear(D, V))),
    "head is None": kind("head | None | nn.Linear", head=None),
    "ref_head is a tuple": kind("ref_head | tuple | LMHead", ref_head=(W, None)),
    "LMHead of an nn.Linear": kind("head.weight | Linear | tensor", head=LMHead(nn.Linear(D, V))),
    "bias is a float": kind("head.bias | 0.5 | tensor", head=LMHead(W, 0.5)),
    "sparse head": kind("head.weight | sparse | dense", head=W.to_sparse()),
    "sparse labels": kind("labels | sparse | dense", labels=torch.zeros(4, L).long().to_sparse()),
    "DTensor head": kind("head.weight | LooksLikeDTensor | plain", head=dtensor(V, D)),
    "DTensor hidden": kind("hidden | LooksLikeDTensor | plain", hidden=dtensor(4, L, D)),
}
HEADS = {
    "softcap 0": value("head.softcap | 0.0 | > 0 | None", head=LMHead(W, softcap=0.0)),
    "softcap negative": value("head.softcap | -30.0 | > 0", head=LMHead(W, softcap=-30.0)),
    "softcap nan": value("head.softcap | nan | finite", head=LMHead(W, softcap=math.nan)),
    "softcap text": kind("head.softcap | '30' | number", head=LMHead(W, softcap="30")),
    "softcap True": kind("head.softcap | True | number", head=LMHead(W, softcap=True)),
    "logit_scale inf": value("head.logit_scale | inf | finite", head=LMHead(W, logit_scale=math.inf)),
    "logit_scale tensor": kind("head.logit_scale | () | number", head=LMHead(W, logit_scale=torch.ones(()))),
    "logit_scale None": kind("head.logit_scale | None | number", head=LMHead(W, logit_scale=None)),
    "logit_scale 10^400": value("head.logit_scale | int of 1329 bits | finite", head=LMHead(W, logit_scale=10**400)),
    "softcap -10^9999": value("head.softcap | bits | finite", head=LMHead(W, softcap=-(10**9999))),
    "softcap 1e-300": value("head.softcap | 1e-300 | float32", head=LMHead(W, softcap=1e-300)),
    "softcap 1e300": value("head.softcap | 1e+300 | float32", head=LMHead(W, softcap=1e300)),
    "logit_scale 1e39": value("head.logit_scale | 1e+39 | float32", head=LMHead(W, logit_scale=1e39)),
    "ref logit_scale": value(
        "ref_head.logit_scale | -1e+39 | float32", ref_head=LMHead(randn(V, E), logit_scale=-1e39)
    ),
    "ref softcap": value("ref_head.softcap | -1.0", ref_head=LMHead(randn(V, E), softcap=-1.0)),
}
LABELS = {
    "label = V": value("labels | 1 label | [0, 11) | 11 at flat position 8 | ignore_index", **relabelled(V)),
    "labels = V": value("labels | 3 label(s) | 11 at flat position 8", **relabelled(V, 12, 19)),
    "label negative": value("labels | [0, 11) | -1 at flat position 8 | ignore_index", **relabelled(-1)),
    "label huge": value("labels | [0, 11) | 1099511627776", **relabelled(2**40)),
    "other ignore_index": value("labels | -100 at flat position 8", **(relabelled(-100) | {"ignore_index": -1})),
    "no ignore_index": value("labels | -100 at flat position 8", **(relabelled(-100) | {"ignore_index": None})),
    "no pack": value("labels | -100 at flat position 8", **(relabelled(-100) | {"ignore_index": None, "shift": False})),
    "int32 label": value("labels | 11 at flat position 8", **{"labels": relabelled(V)["labels"].int()}),
}
OFFSETS = {
    "not from 0": value("cu_seqlens | from 1 to 20 | 0 to N = 20", **packed(offsets(1, 5, 10, 15, N))),
    "not to N": value("cu_seqlens | from 0 to 19 | 0 to N = 20", **packed(offsets(0, 5, 10, 15, N - 1))),
    "past N": value("cu_seqlens | from 0 to 21 | 0 to N = 20", **packed(offsets(0, 5, 10, 15, N + 1))),
    "decreasing": value("cu_seqlens | 12 to 10 | index 2 | never decrease", **packed(offsets(0, 12, 10, 15, N))),
    "negative inside": value("cu_seqlens | 0 to -3 | index 1", **packed(offsets(0, -3, 10, 15, N))),
    "float": kind("cu_seqlens | float32 | int32 | int64", **packed(offsets(0, 5, 10, 15, N).float())),
    "int16": kind("cu_seqlens | int16 | int64", **packed(offsets(0, 5, 10, 15, N).short())),
    "odd count": value("cu_seqlens | 3 sequences | 2P", **packed(offsets(0, 5, 15, N))),
    "no sequence": value("cu_seqlens | 0 sequences | 2P", **packed(offsets(0))),
    "empty": value("cu_seqlens | (0,)", **packed(offsets())),
    "2-D": value("cu_seqlens | (1, 5) | (S + 1,)", **packed(offsets(0, 5, 10, 15, N)[None])),
    "list": kind("cu_seqlens | list | tensor", **packed([0, 5, 10, 15, N])),
    "with 3-D hidden": value("hidden | (4, 5, 8) | (N, D) | cu_seqlens", cu_seqlens=offsets(0, 5, 10, 15, N)),
    "on meta": value("cu_seqlens | meta | cpu", **packed(offsets(0, 5, 10, 15, N).to("meta"))),
}
OPTIONS = {
    "ignore_index float": kind("ignore_index | -100.0 | int", ignore_index=-100.0),
    "ignore_index bool": kind("ignore_index | True | int", ignore_index=True),
    "ignore_index 2^70": value("ignore_index | int of 71 bits | int64", ignore_index=2**70),
    "ignore_index below int64": value("ignore_index | int64", ignore_index=-(2**63) - 1),
    "memory_budget -10^9999": value("memory_budget | bits | bytes >= 0", memory_budget=-(10**9999)),
    "shift int": kind("shift | 1 | True or False", shift=1),
    "shift None": kind("shift | None | True or False", shift=None),
    "memory_budget negative": value("memory_budget | -1 | bytes >= 0", memory_budget=-1),
    "memory_budget float": value("memory_budget | float | bytes >= 0", memory_budget=1e9),
    "memory_budget text": value("memory_budget | '1GB' | bytes >= 0", memory_budget="1GB"),
    "memory_budget None": value("memory_budget | None | bytes >= 0", memory_budget=None),
    "memory_budget True": value("memory_budget | True | bytes >= 0", memory_budget=True),
    "backend unknown": value("backend | 'cuda' | 'auto' | 'tiled' | 'naive'", backend="cuda"),
    "backend None": value("backend | None | 'auto'", backend=None),
}
LOSS = {
    "beta 0": value("beta | 0.0 | > 0", beta=0.0),
    "beta negative": value("beta | -0.1 | > 0", beta=-0.1),
    "beta nan": value("beta | nan | finite", beta=math.nan),
    "beta inf": value("beta | inf | finite", beta=math.inf),
    "beta 10^400": value("beta | int of 1329 bits | finite", beta=10**400),
    "beta -10^9999": value("beta | bits | finite", beta=-(10**9999)),
    "alpha 10^400": value("alpha | int of 1329 bits | finite", alpha=10**400),
    "alpha 10^9999 with tdpo1": value("alpha | bits | tdpo1", variant="tdpo1", alpha=10**9999),
    "sft_weight negative": value("sft_weight | -1 | >= 0", sft_weight=-1),
    "sft_weight text": kind("sft_weight | '1' | number", sft_weight="1"),
    "length_normalized 1": kind("length_normalized | int 1 | True or False", length_normalized=1),
    "beta text": kind("beta | '0.1' | number", beta="0.1"),
    "beta tensor": kind("beta | number", beta=torch.tensor(0.1)),
    "alpha negative": value("alpha | -0.5 | >= 0", alpha=-0.5),
    "alpha nan": value("alpha | nan | finite", alpha=math.nan),
    "alpha text": kind("alpha | 'half' | number", alpha="half"),
    "alpha with tdpo1": value("alpha | 0.5 | tdpo1 | leave it out", variant="tdpo1", alpha=0.5),
    "alpha 0 with tdpo1": value("alpha | tdpo1", variant="tdpo1", alpha=0),
    "variant unknown": value("variant | 'dpo' | 'tdpo1' | 'tdpo2'", variant="dpo"),
    "variant case": value("variant | 'TDPO2' | 'tdpo2'", variant="TDPO2"),
    "reduction unknown": value("reduction | 'avg' | 'mean' | 'sum' | 'none'", reduction="avg"),
    "reduction None": value("reduction | None | 'none'", reduction=None),
}
INPUTS = (SHAPES, DTYPES, DEVICES, KINDS, HEADS, LABELS, OFFSETS)
ONLY_PAIRS = {"0-d hidden", "odd row count", "no rows", "2-D hidden unpacked", "4-D hidden", "odd count", "no sequence"}
