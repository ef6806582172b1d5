"""One call on a backend, in the caller's shapes: what the autograd function (`op.py`) and the operators of
`torch.compile` (`registered.py`) share."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .pack import Steps, flatten, gather, spread, unflatten
from .types import Backend, Forward, Gradients, Inputs, Model, Needs, Rows


@dataclass(frozen=True)
class Call:
    """A backend, its inputs, and the caller's hidden states behind them: their shape and how far apart rows lie."""

    backend: Backend
    inputs: Inputs
    shape: torch.Size
    steps: Steps

    def forward(self, needs: Needs) -> Forward:
        with _settled(self.inputs.policy.hidden):
            return self.backend.forward(self.inputs, needs)

    def statistics(self, out: Forward) -> tuple[Tensor, ...]:
        """logp, kl, ref_logp and extras, shaped like the labels."""
        every = (out.logp_T, out.kl_T, out.ref_logp_T, *out.extras.values())
        return tuple(spread(x_T, self.inputs.rows, self.shape[:-1]) for x_T in every)

    def backward(
        self, needs: Needs, saved: tuple[Tensor | None, ...], g_logp: Tensor | None, g_kl: Tensor | None
    ) -> Gradients:
        if g_logp is None and g_kl is None:
            return Gradients(None, None, None)
        g_logp_T, g_kl_T = (None if g is None else gather(g, self.inputs.rows) for g in (g_logp, g_kl))
        with _settled(self.inputs.policy.hidden):
            grads = self.backend.backward(self.inputs, needs, saved, g_logp_T, g_kl_T)
        if grads.hidden is None:
            return grads
        return Gradients(unflatten(grads.hidden, self.shape, self.steps), grads.weight, grads.bias)


def lay_out(backend: Backend, policy: Model, reference: Model, rows: Rows, memory_budget: int, **options: Any) -> Call:
    """The models' hidden states may have any number of axes; a backend gets matrices. `options`: others of `Inputs`."""
    hidden, ref_hidden, rows, steps = flatten(policy.hidden, reference.hidden, rows)
    sides = Model(hidden, policy.head, policy.dtype), Model(ref_hidden, reference.head, reference.dtype)
    return Call(backend, Inputs(*sides, rows, memory_budget, **options), policy.hidden.shape, steps)


def _settled(x: Tensor) -> contextlib.AbstractContextManager:
    """The compute dtype was settled in `checks.compute_dtype`: nothing below may cast behind our back. Kernels are
    launched on the current device: it is made x's own."""
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast and not x.is_cuda:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    if autocast:
        stack.enter_context(torch.autocast(x.device.type, enabled=False))
    if x.is_cuda:
        stack.enter_context(torch.cuda.device(x.device))
    return stack
