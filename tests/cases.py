"""Make the named cases that every backend runs, each builder in one file with the table that names it.

They have the sizes where it hurts: small enough for thousands of runs, nasty enough to matter.

A `Case` is float64; `Case.problem(dtype)` rounds it to what a user would hold, and that rounded problem is what
everyone, the truth included, computes from. Tiles are meant to be 16 x 64 (`conftest.small_tiles`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tdpo_kernels import LMHead

IGNORE = -100
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INF = float("inf")


@dataclass(frozen=True)
class Problem:
    """One call of `token_stats`."""

    hidden: Tensor
    head: LMHead
    ref_hidden: Tensor
    ref_head: LMHead
    labels: Tensor
    shift: bool
    ignore_index: int | None

    @property
    def stats_dtype(self) -> torch.dtype:
        return torch.promote_types(torch.promote_types(self.hidden.dtype, self.ref_hidden.dtype), torch.float32)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Flat positions of the labels that count, and of the hidden states that predict them, the long way round."""
        at, by, length = [], [], self.labels.shape[-1]
        for n, label in enumerate(self.labels.flatten().tolist()):
            if label != self.ignore_index and not (self.shift and n % length == 0):
                at.append(n)
                by.append(n - 1 if self.shift else n)
        return torch.tensor(at, dtype=torch.long), torch.tensor(by, dtype=torch.long)

    def to(self, where: str | torch.dtype) -> Problem:
        """The problem on a device, or with the same numbers in a dtype."""

        def head(h: LMHead) -> LMHead:
            return replace(h, weight=h.weight.to(where), bias=None if h.bias is None else h.bias.to(where))

        labels = self.labels if isinstance(where, torch.dtype) else self.labels.to(where)
        return replace(
            self, hidden=self.hidden.to(where), head=head(self.head), ref_hidden=self.ref_hidden.to(where),
            ref_head=head(self.ref_head), labels=labels,
        )  # fmt: skip


@dataclass(frozen=True)
class Case:
    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    ref_bias: Tensor | None = None
    options: dict[str, float] = field(default_factory=dict)
    ref_options: dict[str, float] = field(default_factory=dict)
    shift: bool = True
    ignore_index: int | None = IGNORE
    ref_dtypes: dict[torch.dtype, torch.dtype] = field(default_factory=dict)
    tile: tuple[int, int] = (16, 64)

    def problem(self, dtype: torch.dtype) -> Problem:
        other = self.ref_dtypes.get(dtype, dtype)
        bias, ref_bias = (b if b is None else b.to(d) for b, d in ((self.bias, dtype), (self.ref_bias, other)))
        return Problem(
            self.hidden.to(dtype), LMHead(self.weight.to(dtype), bias, **self.options),
            self.ref_hidden.to(other), LMHead(self.ref_weight.to(other), ref_bias, **self.ref_options),
            self.labels, self.shift, self.ignore_index,
        )  # fmt: skip


def base(
    seed: int = 0, *, B: int = 2, L: int = 24, D: int = 24, V: int = 211, std: float = 1.0, apart: float = 0.3,
    ignored: float = 0.25,
) -> Case:  # fmt: skip
    """Logits of standard deviation `std`; the reference is `apart` away; a part of the labels is ignored."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight = randn(B, L, D), randn(V, D) * std / D**0.5
    ref_hidden, ref_weight = hidden + apart * randn(B, L, D), weight + apart * randn(V, D) * std / D**0.5
    labels = torch.randint(0, V, (B, L), generator=g)
    labels[torch.rand(B, L, generator=g) < ignored] = IGNORE
    return Case(hidden, weight, ref_hidden, ref_weight, labels)


def bias_of(case: Case, seed: int = 1, size: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return size * torch.randn(case.weight.shape[0], generator=g, dtype=torch.float64)


def constant(case: Case, value: float) -> Tensor:
    return torch.full_like(case.weight[:, 0], value)


def dense() -> Case:
    """Every row counts and none is gathered; five full row blocks."""
    return replace(base(10, B=1, L=80, ignored=0.0), shift=False, ignore_index=None)


def near_equal() -> Case:
    """Apart by 1e-4 in the reference's bias, which 16 bits can hold too."""
    case = base(3, apart=0.0, std=2.0)
    return replace(case, bias=constant(case, 0.0), ref_bias=bias_of(case, 3, 1e-4))


def near_equal_wide() -> Case:
    """Log-sum-exps of so many columns round by more than their share of what the models are apart."""
    case = base(1, V=1100, apart=0.0)
    bias = bias_of(case, 1)
    return replace(case, bias=bias, ref_bias=bias + bias_of(case, 2, 1e-4), tile=(16, 512))


def hated_part() -> Case:
    """A tile in which the reference is flat, and of which the policy likes nothing but one token, and that little."""
    case = base(1, V=1024, std=0.3, apart=0.1, ignored=0.0)
    bias = bias_of(case, 1, 0.3)
    ref_bias = bias + bias_of(case, 2, 0.1)
    bias[256:512] -= 30.0
    bias[261] += 15.0
    return replace(every_label(case, [3, 700]), bias=bias, ref_bias=ref_bias, tile=(1024, 256))


def offset(value: float) -> Case:
    """All logits of one model higher than the other's by a constant, which changes nothing at all."""
    case = base(4, apart=0.1)
    return replace(case, ref_bias=constant(case, value))


def near_equal_offset() -> Case:
    case = base(5, apart=0.0)
    return replace(case, bias=bias_of(case, 6, 0.01), ref_bias=constant(case, 50.0))


def of_logits(z: Tensor, r: Tensor, labels: Tensor, **options: object) -> Case:
    """These very ``(T, V)`` logits, whatever makes products: hidden states are the rows of an identity. So the
    gradient of the weight is dz itself, transposed."""
    eye = torch.eye(len(z), dtype=torch.float64)[None]
    return Case(eye, z.double().T, eye, r.double().T, labels[None], shift=False, **options)


def every_label(case: Case, choices: list[int]) -> Case:
    chosen = torch.tensor(choices)[torch.arange(case.labels.numel()) % len(choices)].view_as(case.labels)
    return replace(case, labels=torch.where(case.labels == IGNORE, IGNORE, chosen))


def ruled_out(policy: bool = True, reference: bool = True, first_tile: bool = False) -> Case:
    """-inf here and there, and through a whole tile: columns 128 to 191, or the very first."""
    case = base(7)
    out = torch.zeros(211, dtype=torch.bool)
    out[3::11] = True
    out[slice(0, 64) if first_tile else slice(128, 192)] = True
    case = every_label(case, [v for v in range(211) if not out[v]][::7])
    parts = (bias_of(case, s).masked_fill(out, -INF) if there else None for s, there in ((1, policy), (2, reference)))
    bias, ref_bias = parts
    return replace(case, bias=bias, ref_bias=ref_bias)


def pushed(amount: float, *, policy: bool, count: int = 5) -> Case:
    """A few tokens, one of them a label, that one model alone puts `amount` nats up or down."""
    case = base(8)
    bias = constant(case, 0.0)
    bias[[0, 63, 64, 150, 210][:count]] = amount
    case = every_label(case, [5, 64, 100, 209])
    return replace(case, bias=bias) if policy else replace(case, bias=constant(case, 0.0), ref_bias=bias)


def label_ruled_out() -> Case:
    """A label that a mask forbids: its log-probability is -inf, and nothing else suffers."""
    case = ruled_out()
    labels = case.labels.clone()
    labels[:, ::3] = 3
    return replace(case, labels=labels)


def ruled_out_capped() -> Case:
    """A bias of -inf rules a token out whatever scale and softcap are made of the others."""
    options = dict(logit_scale=0.7, softcap=5.0), dict(logit_scale=-1.3, softcap=7.0)
    return replace(ruled_out(), options=options[0], ref_options=options[1])


def sure(policy: float, reference: float | None = None) -> Case:
    """Every label so many nats above the rest, in the policy and in the reference."""
    case = every_label(base(62, D=16, V=1025), [700])
    bias, ref_bias = bias_of(case, 1, 0.1), bias_of(case, 2, 0.1)
    bias[700] += policy
    ref_bias[700] += policy if reference is None else reference
    return replace(case, bias=bias, ref_bias=ref_bias, tile=(32, 512))


def sure_of_another(nats: float = 25.0) -> Case:
    """The reference is sure of the label, the policy of another token."""
    case = every_label(base(63, V=268, std=0.3), [200])
    bias, ref_bias = bias_of(case, 1, 0.1), bias_of(case, 2, 0.1)
    bias[17] += nats
    ref_bias[200] += nats
    return replace(case, bias=bias, ref_bias=ref_bias)


def capped_flat() -> Case:
    """Every logit so far up its cap that the slope, as ``1 - tanh^2``, has no digits."""
    case = base(64, std=0.3)
    return replace(case, bias=10 * bias_of(case).sign(), ref_bias=bias_of(case), options=dict(softcap=1.0))


def surer_than(reference: float, policy: float, V: int = 2) -> Case:
    """One token so many nats above the others: log-ratios at which what is staged is held."""
    case = replace(tiny(V, B=2, L=9), ref_bias=None)
    bias, ref_bias = constant(case, 0.0), constant(case, 0.0)
    bias[0], ref_bias[0] = policy, reference
    return replace(case, bias=bias, ref_bias=ref_bias)


def labels_of_reference() -> Case:
    """Every label the reference's own choice, as of pairs that it wrote."""
    case = base(2, std=10.0)
    best = (case.ref_hidden @ case.ref_weight.T).argmax(-1)
    return replace(case, labels=torch.where(case.labels == IGNORE, IGNORE, best))


def first_tile_down(amount: float) -> Case:
    """The first tile, and a little more, far below the rest in both models: nothing may be lost above it."""
    case = base(60)
    bias = constant(case, 0.0)
    bias[:70] = amount
    return replace(every_label(case, [100, 150, 209]), bias=bias, ref_bias=bias.clone())


def shared_ratio(shift: float, sure: float = 0.0) -> Case:
    """Every other token `shift` nats from the reference, so that its log-ratios are but two and round alike; and a
    vector common to all rows of W, by which dh shows whatever rows of dz fail to sum to 0. The one label is `sure`
    nats above the rest."""
    case = base(61, D=32, V=1021, apart=0.0)
    weight = case.weight + 0.2 * torch.randn(32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    bias, ref_bias = constant(case, 0.0), constant(case, 0.0)
    ref_bias[::2] = shift
    if sure:
        case = every_label(case, [700])
        bias[700], ref_bias[700] = sure, sure
    return replace(case, weight=weight, ref_weight=weight.clone(), bias=bias, ref_bias=ref_bias, tile=(32, 512))


def sure_of_different_tokens() -> Case:
    """Policy and reference each all but certain, of other tokens in other tiles: KL beyond what exp() holds in fp32."""
    case = base(9)
    bias, ref_bias = constant(case, 0.0), constant(case, 0.0)
    bias[10], ref_bias[200] = 150.0, 150.0
    return replace(every_label(case, [10, 200, 70]), bias=bias, ref_bias=ref_bias)


def softcap(tight: float = 5.0) -> Case:
    case = base(11, std=4.0)
    return replace(
        case, bias=bias_of(case, 1, 2.0), ref_bias=bias_of(case, 2), options=dict(softcap=tight, logit_scale=0.7),
        ref_options=dict(softcap=7.0, logit_scale=1.3),
    )  # fmt: skip


def other_width() -> Case:
    case, other = base(12, D=24), base(13, D=40)
    return replace(case, ref_hidden=other.ref_hidden, ref_weight=other.ref_weight)


def reference_in(dtypes: dict[torch.dtype, torch.dtype]) -> Case:
    return replace(base(14), ref_dtypes=dtypes)


def tiny(V: int, B: int = 1, L: int = 1, shift: bool = False) -> Case:
    case = base(15, B=B, L=L, V=V, ignored=0.0)
    return replace(case, shift=shift, bias=bias_of(case))


def all_ignored() -> Case:
    case = base(16)
    return replace(case, labels=torch.full_like(case.labels, IGNORE))


def wide() -> Case:
    """Tiles of 32 x 512 over a prime vocabulary."""
    return replace(base(17, L=33, D=48, V=4099), tile=(32, 512))


_OTHER = dict.fromkeys(DTYPES, torch.float32) | {torch.float32: torch.bfloat16}
_F64 = dict.fromkeys(DTYPES, torch.float64)

CASES: dict[str, Callable[[], Case]] = {
    "scaled": lambda: base(1),  # logits of standard deviation 1: a long flat tail
    "dense": dense,
    "peaked_10": lambda: base(2, std=10.0),
    "peaked_30": lambda: base(2, std=30.0),
    "near_equal": near_equal,
    "near_equal_offset": near_equal_offset,
    "near_equal_wide": near_equal_wide,
    "offset_50": lambda: offset(50.0),
    "offset_1000": lambda: offset(1000.0),
    "wide": wide,
    "prime_V": lambda: base(18, V=509),
    "one_full_tile": lambda: base(19, V=64),
    "one_column_left": lambda: base(23, V=193),
    "more_rows_than_V": lambda: base(20, L=40, V=37, std=2.0),
    "V_1": lambda: tiny(1, B=2, L=9),
    "V_2": lambda: tiny(2, B=2, L=9),
    "label_in_last_tile": lambda: every_label(base(21), [208, 209, 210]),
    "T_0": lambda: tiny(67, L=0),
    "T_0_shifted": lambda: tiny(67, L=1, shift=True),
    "T_1": lambda: tiny(131),
    "all_ignored": all_ignored,
    "ruled_out": ruled_out,
    "ruled_out_first_tile": lambda: ruled_out(first_tile=True),
    "ruled_out_by_reference": lambda: ruled_out(policy=False),
    "hated_by_policy_300": lambda: pushed(-300.0, policy=True),
    "hated_by_reference_104": lambda: pushed(-104.0, policy=False),
    "hated_by_reference_300": lambda: pushed(-300.0, policy=False),
    "loved_by_policy_104": lambda: pushed(104.0, policy=True, count=1),
    "loved_by_reference_300": lambda: pushed(300.0, policy=False, count=1),
    "hated_by_policy_1e9": lambda: pushed(-1e9, policy=True, count=1),
    "ruled_out_by_policy": lambda: pushed(-INF, policy=True, count=1),
    "ruled_out_by_policy_first_tile": lambda: ruled_out(reference=False, first_tile=True),
    "first_tile_down_1e9": lambda: first_tile_down(-1e9),
    "shared_ratio_0.5": lambda: shared_ratio(0.5),
    "shared_ratio_sure": lambda: shared_ratio(0.1, sure=9.0),
    "sure_of_different_tokens": sure_of_different_tokens,
    "surer_by_32": lambda: surer_than(0.0, 32.0),
    "labels_of_reference": labels_of_reference,
    "softcap": softcap,
    "softcap_saturated": lambda: softcap(tight=1.5),
    "softcap_flat": capped_flat,
    "ruled_out_capped": ruled_out_capped,
    "ruled_out_label": label_ruled_out,
    "sure_15": lambda: sure(15.0),
    "sure_20": lambda: sure(20.0),
    "sure_23": lambda: sure(23.0),
    "sure_30": lambda: sure(30.0),
    "sure_30_of_reference": lambda: sure(0.0, 30.0),
    "sure_of_another": sure_of_another,
    "scale_only": lambda: replace(base(22, std=3.0), options=dict(logit_scale=0.25), ref_options=dict(logit_scale=0.5)),
    "other_width": other_width,
    "reference_in_other_dtype": lambda: reference_in(_OTHER),
    "reference_in_float64": lambda: reference_in(_F64),
    "hated_300_float64": lambda: replace(pushed(-300.0, policy=True), ref_dtypes=_F64),
}

Cotangents = tuple[Tensor | None, Tensor | None]  # of logp and of kl, shaped like labels


def _general(shape: torch.Size, seed: str) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return tuple(torch.randn(2, *shape, generator=g, dtype=torch.float64))


def _mixed(a: Tensor, b: Tensor) -> Cotangents:
    """Return blocks of 16 rows: nothing, kl unused, both equal, general; then rows of every kind in one block."""
    n = torch.arange(a.numel()).view_as(a)
    kind = torch.where(n < 64, n // 16, n % 4)
    a = torch.where(kind == 0, 0.0, a)
    return a, torch.where(kind < 2, 0.0, torch.where(kind == 2, a, b))


COTANGENTS: dict[str, Callable[[Tensor, Tensor], Cotangents]] = {
    "general": lambda a, b: (a, b),
    "kl_zero": lambda a, b: (a, torch.zeros_like(b)),
    "logp_zero": lambda a, b: (torch.zeros_like(a), b),
    "equal": lambda a, b: (a, a.clone()),
    "only_logp": lambda a, b: (a, None),
    "only_kl": lambda a, b: (None, b),
    "zero_blocks": lambda a, b: tuple(torch.where(torch.arange(a.numel()).view_as(a) < 30, 0.0, x) for x in (a, b)),
    "all_zero": lambda a, b: (torch.zeros_like(a), torch.zeros_like(b)),
    "mixed_blocks": _mixed,
    "apart_1e-7": lambda a, b: (a, a * (1 + 1e-7)),
    "apart_1e-6": lambda a, b: (a, a * (1 + 1e-6)),
    "apart_1e-4": lambda a, b: (a, a * (1 + 1e-4)),
}


def cotangents(name: str, labels: Tensor) -> Cotangents:
    return COTANGENTS[name](*_general(labels.shape, "cotangents"))


EVERY_COTANGENT = ("scaled", "dense", "peaked_10", "near_equal", "softcap", "ruled_out", "sure_20", "sure_of_another")
RUNS = [(case, "general") for case in CASES] + [(c, g) for c in EVERY_COTANGENT for g in COTANGENTS if g != "general"]
RUNS += [(case, "equal") for case in CASES if case.startswith("sure_") and case not in EVERY_COTANGENT]
RUNS += [
    ("hated_by_policy_300", "equal"), ("hated_by_policy_1e9", "only_logp"), ("hated_by_policy_1e9", "equal"),
    ("ruled_out_by_policy", "only_logp"), ("ruled_out_by_policy", "equal"), ("shared_ratio_0.5", "logp_zero"),
    ("shared_ratio_sure", "kl_zero"), ("sure_of_different_tokens", "logp_zero"), ("softcap_flat", "only_logp"),
    ("ruled_out_capped", "equal"), ("surer_by_32", "only_kl"), ("labels_of_reference", "equal"),
]  # fmt: skip
