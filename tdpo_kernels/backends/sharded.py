"""A backend over a vocabulary that lies split over ranks: another backend on each one's part, merged here.

Each rank k has the statistics of its part alone, under the part's own softmaxes p_k and q_k, and the masses u_k, w_k
that policy and reference put on the part. Both are chain rules, of terms that are never negative:

    (10)  KL(q || p) = KL(w || u) + sum_k w_k KL(q_k || p_k)          entropy = sum_k u_k (entropy_k - log u_k)

KL(w || u) is eq. (9) of `tile_math`, a part's logits merged into one column. In a part ``p = u_k p_k`` and
``q = w_k q_k``, so eq. (6) has the same form in p_k and q_k: but for the label's entry, its dz is that of cotangents

    (11)  G_kl = g_kl w_k        G_logp = g_logp u_k + g_kl (w_k - u_k)        and at the label, g_logp - G_logp more

Forward gathers a few numbers a row from each rank, backward sums dh over the ranks in the statistics' dtype; dW and db
stay where they are. Every rank merges alike, in rank order: all have the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor

from ..collectives import gathered, position, same, summed_, told
from ..types import Backend, Forward, Gradients, Inputs, Needs
from .regroup import reference_part
from .tile_math import LOWEST, Part, is_lowest, merge, to_infinity, within

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

STATE = ("z_top", "r_top", "lse_z", "lse_r", "lse_diff")  # as `Forward.state`: what parts are merged by
SENT = (*STATE, "kl", "logp", "ref_logp")  # by each rank of each row; then extras


@dataclass(frozen=True)
class Sharded:
    """`inner` on each rank's part of the policy's vocabulary."""

    inner: Backend

    def forward(self, inputs: Inputs, needs: Needs) -> Forward:
        _agree_once(inputs, needs)
        head, part = inputs.policy.head, self._part(inputs)
        out = self.inner.forward(part, needs) if head.weight.shape[0] else _nothing(part)
        extras = [_summable(name, out.extras[name], head.weight.shape[0]) for name in inputs.extras]
        sent_FT = torch.stack([*out.state, out.kl_T, out.logp_T, out.ref_logp_T, *extras])
        whole = _Whole.of(gathered(sent_FT, head.group), inputs)
        return replace(whole.forward(), saved=(*whole.masses(position(head.group)), *out.saved) if needs else ())

    def backward(
        self,
        inputs: Inputs,
        needs: Needs,
        saved: tuple[Tensor | None, ...],
        g_logp_T: Tensor | None,
        g_kl_T: Tensor | None,
        g_label_T: Tensor | None = None,
    ) -> Gradients:
        head, part = inputs.policy.head, self._part(inputs)
        cotangents = _cotangents(saved[:_MASSES], part.rows.own_T, g_logp_T, g_kl_T)
        if head.weight.shape[0]:
            grads = self.inner.backward(part, needs, saved[_MASSES:], *cotangents)
        else:
            grads = _no_gradients(part, needs)
        return replace(grads, hidden=_whole_dh(grads.hidden, inputs)) if needs.hidden else grads

    def _part(self, inputs: Inputs) -> Inputs:
        """What this rank computes alone: its columns."""
        head, labels_T = inputs.policy.head, inputs.rows.labels_T
        columns = head.columns
        own_T = (labels_T >= columns.start) & (labels_T < columns.stop)
        rows = replace(inputs.rows, labels_T=(labels_T - columns.start).where(own_T, 0), own_T=own_T)
        return replace(inputs, reference=reference_part(inputs.reference, head), rows=rows, partial=True)


_agreed: WeakSet[ProcessGroup] = WeakSet()  # a name is given again once its group is destroyed


def _agree_once(inputs: Inputs, needs: Needs) -> None:
    """Ranks that have different tokens or heads would be answered with nonsense, or hang. Asked at a group's first
    call, as it takes the host."""
    group, rows = inputs.policy.head.group, inputs.rows
    if group in _agreed:
        return
    checksum = int((rows.labels_T * torch.arange(1, rows.count + 1).to(rows.labels_T)).sum())
    facts = {"labels: how many count": rows.count, "labels: a checksum": checksum, "extras": inputs.extras}
    facts["hidden: its gradient is wanted"] = needs.hidden
    for name, side in (("head", inputs.policy), ("ref_head", inputs.reference)):
        head = side.head
        facts |= {
            f"{name}: rows of each rank": getattr(head, "sizes", head.vocab),
            f"{name}.weight: D": head.weight.shape[1],
            f"{name}.weight: computed in": side.dtype,
            f"{name}.bias: there is one": head.bias is not None,
            f"{name}.logit_scale": head.logit_scale,
            f"{name}.softcap": head.softcap,
        }
    same(told(tuple(map(str, facts.values())), group), tuple(facts))
    _agreed.add(group)


# --- forward ---------------------------------------------------------------------------------------------------------


def _nothing(part: Inputs) -> Forward:
    """Of a rank without columns: no mass."""
    zero_T = part.policy.hidden.new_zeros(part.rows.count, dtype=part.stats_dtype)
    out_T = torch.full_like(zero_T, LOWEST)
    state = (out_T, out_T, zero_T, zero_T, zero_T)
    return Forward(zero_T, zero_T, zero_T, dict.fromkeys(part.extras, zero_T), state=state)


def _summable(name: str, x_T: Tensor, columns: int) -> Tensor:
    return x_T * columns if name == "mean_logit" and columns else x_T


_MASSES = 5


@dataclass(frozen=True, eq=False)
class _Whole:
    """All ranks' parts, ``(W, T)`` each, and what they make."""

    inputs: Inputs
    parts: dict[str, Tensor]
    state: Part  # of the vocabulary with each part for a column: its kl is KL(w || u)
    u: Tensor
    w: Tensor
    more: Tensor  # w - u, without cancellation
    log_u: Tensor
    log_w: Tensor

    @staticmethod
    def of(sent_WFT: Tensor, inputs: Inputs) -> _Whole:
        parts = dict(zip((*SENT, *inputs.extras), sent_WFT.unbind(1), strict=True))
        tops_2W, lse_2W = (torch.stack([parts[z], parts[r]]) for z, r in (STATE[:2], STATE[2:4]))
        columns = [
            Part(tops_2R, lse_2R, kl=torch.zeros_like(diff), lse_diff=diff)
            for tops_2R, lse_2R, diff in zip(*(x.unbind(1) for x in (tops_2W, lse_2W)), parts["lse_diff"], strict=True)
        ]
        state = merge(columns)
        u, w, more = within(columns, state)
        log_u, log_w = (tops_2W - state.tops_2R[:, None]) + lse_2W - state.lse_2R[:, None]
        return _Whole(inputs, parts, state, u, w, more, log_u, log_w)

    def masses(self, rank: int) -> tuple[Tensor, ...]:
        return tuple(x[rank].clone() for x in (self.u, self.w, self.more, self.log_u, self.log_w))

    def forward(self) -> Forward:
        kl = self.state.kl + (self.w * self.parts["kl"]).sum(0)
        out, ref_out = is_lowest(self.parts["z_top"]), is_lowest(self.parts["r_top"])
        missed = (self.parts["kl"] == torch.inf) | (out & ~ref_out)
        logp, ref_logp = (
            to_infinity(self._of_owner(self.parts[name] + log_mass))
            for name, log_mass in (("logp", self.log_u), ("ref_logp", self.log_w))
        )
        extras = {name: getattr(self, f"_{name}")() for name in self.inputs.extras}
        return Forward(logp, ref_logp, kl.masked_fill(missed.any(0), torch.inf), extras)

    def _of_owner(self, x_WT: Tensor) -> Tensor:
        """Of the rank that has the label among its columns."""
        ends = torch.tensor(self.inputs.policy.head.sizes, device=x_WT.device).cumsum(0)
        owner_T = torch.bucketize(self.inputs.rows.labels_T, ends, right=True)
        return x_WT.gather(0, owner_T[None])[0]

    def _entropy(self) -> Tensor:
        return (self.u * (self.parts["entropy"] - self.log_u)).where(self.u > 0, 0.0).sum(0)

    def _mean_logit(self) -> Tensor:
        return self.parts["mean_logit"].sum(0) / self.inputs.policy.head.vocab

    def _is_argmax(self) -> Tensor:
        return self._of_owner(self.parts["is_argmax"].where(self.parts["z_top"] >= self.state.tops_2R[0], 0.0))


# --- backward --------------------------------------------------------------------------------------------------------


def _cotangents(
    masses: tuple[Tensor, ...], own_T: Tensor, g_logp_T: Tensor | None, g_kl_T: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Eq. (11): of logp, of the KL (None stays None), and of the label's own logit.

    Where g_kl is g_logp, so that no p is needed, G_kl stays G_logp; the difference at the label is had from 1 - u =
    -expm1(log u).
    """
    u, w, more, log_u, log_w = masses
    g_logp = torch.zeros_like(u) if g_logp_T is None else g_logp_T.to(u.dtype)
    if g_kl_T is None:
        return g_logp * u, None, (-g_logp * torch.expm1(log_u)).where(own_T, 0.0)
    g_kl = g_kl_T.to(u.dtype)
    same, G_kl = g_kl == g_logp, g_kl * w
    G_logp = torch.where(same, G_kl, torch.addcmul(g_logp * u, g_kl, more))
    rest = torch.where(same, -g_kl * torch.expm1(log_w), -g_logp * torch.expm1(log_u) - g_kl * more)
    return G_logp, G_kl, rest.where(own_T, 0.0)


def _no_gradients(part: Inputs, needs: Needs) -> Gradients:
    hidden, head = part.policy.hidden, part.policy.head
    return Gradients(
        hidden.new_zeros(part.rows.count, hidden.shape[1], dtype=part.stats_dtype) if needs.hidden else None,
        torch.zeros_like(head.weight) if needs.weight else None,
        torch.zeros_like(head.bias) if needs.bias else None,
    )


def _whole_dh(dh_TD: Tensor, inputs: Inputs) -> Tensor:
    """Summed over the ranks, then rounded, once."""
    hidden, index = inputs.policy.hidden, inputs.rows.hidden_T
    dh_TD = summed_(dh_TD, inputs.policy.head.group).to(hidden.dtype)
    return dh_TD if index is None else torch.zeros_like(hidden).index_copy_(0, index, dh_TD)
