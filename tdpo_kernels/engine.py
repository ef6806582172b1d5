"""Run rows through a backend, on one device or on the ranks of a split vocabulary: all that lies above the backends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .backends import choose, rowmath, sharded
from .backends.logits import ruled_out
from .types import Gradients, Inputs, Model, Needs, Rows, Workspace


def inputs_of(policy: Model, reference: Model, rows: Rows, extras: tuple[str, ...] = ()) -> Inputs:
    """Return what backends see, with a workspace of its own."""
    return Inputs(policy, reference, rows, extras, Workspace(policy.hidden.device))


def statistics(inputs: Inputs, backend: str, needs: Needs, kept: Tensor) -> rowmath.Whole:
    """Return the statistics of all rows, and fill `kept`, which is flat, with as many logits as fit."""
    policy, reference, group = inputs.policy, inputs.reference, inputs.policy.head.group
    _, inner = choose(backend, policy.hidden.device, (policy, reference))
    with _settled(policy.hidden):
        if group is None:
            part, out = inner.forward(inputs, kept), ruled_out(policy, reference)
        else:
            part, out = sharded.forward(inner, inputs, needs, kept)
        found = rowmath.whole(part.state, part.labels, inputs.extras, policy.head.vocab)
        return found if out is None else found._replace(shown=rowmath.with_infinities(found.shown, inputs.extras, out))


def gradients(
    inputs: Inputs, backend: str, needs: Needs, kept: Tensor, row: Tensor, total: Gradients | None = None
) -> Gradients:
    """Return the gradients from the rows' values that `rowmath.cotangents` returns; `total` as `Backend` has it."""
    policy = inputs.policy
    _, inner = choose(backend, policy.hidden.device, (policy, inputs.reference))
    with _settled(policy.hidden):
        if policy.head.group is None:
            return inner.backward(inputs, needs, kept, row, total)
        return sharded.backward(inner, inputs, needs, kept, row, total)


@contextlib.contextmanager
def _settled(x: Tensor) -> Iterator[None]:
    """Turn autocast off, for `checks.compute_dtype` settled the dtype, and make x's device the current one."""
    with contextlib.ExitStack() as stack:
        if torch.is_autocast_enabled(x.device.type):
            stack.enter_context(torch.autocast(x.device.type, enabled=False))
        if x.is_cuda:
            stack.enter_context(torch.cuda.device(x.device))
        yield
