"""Define the words of the library: its axes and its plain data.

Axes, used as shape suffixes everywhere (``lse_T`` has shape ``(T,)``):

====  =========================================================================
N     rows of ``hidden`` as the caller gave them (``2P * L``, or the packed length)
T     valid response tokens, what is left of N once ignored labels are dropped
S     sequences, ``2P``: the P chosen first, then their P rejected
P     preference pairs
D, E  hidden size of the policy, of the reference model
V     vocabulary
R, C  rows and columns of one tile of logits
K     parts of a vocabulary that are merged
====  =========================================================================

Dataclasses that hold tensors compare by identity (``eq=False``), because tensors have no single truth value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:  # there are builds of torch without it
    from torch.distributed import ProcessGroup

Extras = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LMHead:
    """Map a hidden state to logits: ``softcap * tanh(logit_scale * (h W^T + b) / softcap)``.

    weight: ``(V, D)``; bias: ``(V,)`` or None, in the weight's dtype; ``softcap=None`` leaves out the tanh. A bias of
    -inf, or below -1e29, rules a token out, whatever the scale and the softcap.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab(self) -> int:
        """Return V."""
        return self.weight.shape[0]

    @property
    def widest(self) -> int:
        """Return the most rows that a rank holds, V if there is one."""
        return self.vocab

    @property
    def group(self) -> ProcessGroup | None:
        """Return the ranks that the vocabulary is split over, or None."""
        return None


@dataclass(frozen=True, eq=False)
class VocabParallelHead(LMHead):
    """Hold one rank's rows of a head whose vocabulary is split over a process group, in rank order.

    `tdpo_kernels.parallel.vocab_parallel` makes it.
    group: the ranks; sizes: how many rows each of them holds.
    """

    group: ProcessGroup | None = None
    sizes: tuple[int, ...] = ()

    @property
    def vocab(self) -> int:
        """Return V, the rows of all ranks together."""
        return sum(self.sizes)

    @property
    def widest(self) -> int:
        return max(self.sizes)

    @property
    def columns(self) -> slice:
        """Return where this rank's rows stand in the vocabulary."""
        return self.columns_of(self.group.rank())

    def columns_of(self, rank: int) -> slice:
        first = sum(self.sizes[:rank])
        return slice(first, first + self.sizes[rank])


class Model(NamedTuple):
    """Hold one model's hidden states ``(..., L, D)`` or ``(N, D)``, its head, and the dtype of its products."""

    hidden: Tensor
    head: LMHead
    dtype: torch.dtype


def stats_dtype(policy: Model, reference: Model) -> torch.dtype:
    """Return fp32, or float64 if one of the models is float64."""
    return torch.float64 if torch.float64 in (policy.hidden.dtype, reference.hidden.dtype) else torch.float32


@dataclass(frozen=True, eq=False)
class Rows:
    """Say which hidden row predicts which label. ``None`` stands for "all N, in order", which costs no gather."""

    hidden_T: Tensor | None  # int64, the row of `hidden` that predicts
    label_T: Tensor | None  # int64, the position in `labels` that the statistics belong to
    labels_T: Tensor  # int64; outside [0, V) where the label is not in this part of a split vocabulary

    @property
    def count(self) -> int:
        return self.labels_T.numel()


class Needs(NamedTuple):
    """Say which gradients are wanted. The others cost neither time nor memory."""

    hidden: bool
    weight: bool
    bias: bool


class Workspace:
    """Hold buffers by name, made at first use and used again, so that no tile costs page faults twice."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: dict[str, Tensor] = {}
        self.views: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}

    def get(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Return a contiguous view of the buffer `name`, grown if need be, whose content is whatever was there."""
        view = self.views.get((name, dtype, shape))
        if view is None:
            have, wanted = self.buffers.get(name), math.prod(shape)
            if have is None or have.numel() < wanted or have.dtype != dtype:
                self.views = {key: x for key, x in self.views.items() if key[0] != name}
                have = self.buffers[name] = torch.empty(wanted, dtype=dtype, device=self.device)
            flat = have if have.numel() == wanted else have[:wanted]
            view = self.views[name, dtype, shape] = flat.view(shape)
        return view


@dataclass(frozen=True, eq=False)
class Inputs:
    """Hold everything a backend sees. Nothing in it knows about preferences, or about ranks."""

    policy: Model
    reference: Model
    rows: Rows
    extras: Extras
    work: Workspace

    @cached_property
    def stats_dtype(self) -> torch.dtype:
        return stats_dtype(self.policy, self.reference)


class Part(NamedTuple):
    """Hold the result of a backend's forward on its part of the vocabulary."""

    state: Tensor  # (STATE, T): the state of all columns but the labels, `backends/rowmath.py`
    labels: Tensor  # (2, T): the labels' logits in both models, 0 where the label is in another part


class Gradients(NamedTuple):
    hidden: Tensor | None  # (N, D), zero in rows that predict nothing
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)


SUMMANDS = Gradients(None, None, None)  # a `total` that adds to no gradient


@dataclass(frozen=True, eq=False)
class TokenStats:
    """Hold per-token statistics, shaped like ``labels``, fp32 (float64 for float64 inputs), zero where ignored.

    ``logp`` and ``kl`` are differentiable; ``ref_logp`` and ``extras`` are not. Units: nats.
    """

    logp: Tensor
    ref_logp: Tensor
    kl: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)

    def detach(self) -> TokenStats:
        """Return the same statistics without their graph."""
        return TokenStats(self.logp.detach(), self.ref_logp, self.kl.detach(), self.extras)


@dataclass(frozen=True, eq=False)
class TDPOOutput:
    """Hold ``loss`` (scalar, or ``(P,)`` for ``reduction="none"``) and detached ``(P,)`` sums over sequences' tokens.

    Rewards are eq. (5): ``beta * (m + k)``. They include the KL, as in the paper's published code. `tokens` has the
    detached statistics that the sums are taken over, with the extras asked for.
    """

    loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_kl: Tensor
    rejected_kl: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    tokens: TokenStats
