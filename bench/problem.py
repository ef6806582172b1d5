"""Make one TDPO step's inputs. Every provider gets the same ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .shapes import Shape

BETA, ALPHA = 0.1, 0.5
IGNORE = -100
PEAKED = 8.0


class Step(NamedTuple):
    """Forward returns what backward takes. Together they leave gradients on the problem."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] = Tensor.backward


@dataclass(frozen=True, eq=False)
class Problem:
    """TDPO2 with a frozen reference; labels already shifted."""

    hidden: Tensor  # (2P, L, D), a leaf that wants a gradient unless the shape is of forward alone
    weight: Tensor  # (V, D), likewise, and not where the head is frozen
    ref_hidden: Tensor
    ref_weight: Tensor
    labels: Tensor  # (2P, L), IGNORE on prompts
    softcap: float | None = None
    prompt: int = 0  # so many tokens at the beginning of every sequence do not count

    def step(self, make: Callable[[Problem], Step]) -> Step:
        """Return a step of a provider. Backward does nothing where the problem wants no gradients."""
        made = make(self)
        return made if self.hidden.requires_grad else Step(made.forward, lambda out: None)

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def gradients(self) -> dict[str, Tensor | None]:
        wanted = {"hidden": self.hidden, "weight": self.weight}
        return {name: x.grad for name, x in wanted.items() if x.requires_grad}

    def double(self) -> Problem:
        """Return the same numbers in float64, for the gate."""
        hidden, weight = (x.detach().double().requires_grad_(x.requires_grad) for x in (self.hidden, self.weight))
        ref_weight = weight.detach() if self.one_head else self.ref_weight.double()
        return replace(self, hidden=hidden, weight=weight, ref_hidden=self.ref_hidden.double(), ref_weight=ref_weight)

    @property
    def one_head(self) -> bool:
        return self.ref_weight.data_ptr() == self.weight.data_ptr()

    def packed(self, x: Tensor) -> Tensor:
        """Flatten ``(2P, L, ...)`` to the rows that count, ``(T, ...)``, as many of each sequence."""
        return x[:, self.prompt :].flatten(0, 1)


def make_problem(shape: Shape, dtype: str, device: torch.device | str = "cpu", seed: int = 0) -> Problem:
    """Draw logits of unit variance, and a reference as near as in training: a KL of about 0.01 nats per token."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=getattr(torch, dtype), device=device).mul_(scale)

    length, spread = shape.T // (2 * shape.pairs), (PEAKED if shape.peaked else 1.0) * shape.D**-0.5
    tokens = (2 * shape.pairs, length)
    hidden, weight = normal(*tokens, shape.D, scale=1.0), normal(shape.V, shape.D, scale=spread)
    ref_hidden = normal(*tokens, shape.D, scale=0.1).add_(hidden)
    ref_weight = weight if shape.one_head else normal(shape.V, shape.D, scale=0.1 * spread).add_(weight)
    labels = torch.randint(shape.V, tokens, generator=generator, device=device)
    prompt = length - round(shape.valid * length)
    labels[:, :prompt] = IGNORE
    if shape.layout == "hidden-rows":
        hidden, ref_hidden = (_within(x, (*tokens, 2 * shape.D), slice(shape.D)) for x in (hidden, ref_hidden))
    elif shape.layout != "contiguous":
        one_head, weight = shape.one_head, _laid_out(weight, shape.layout)
        ref_weight = weight if one_head else _laid_out(ref_weight, shape.layout)
    hidden.requires_grad_(shape.gradients)
    leaf = weight.detach().requires_grad_(shape.trainable and shape.gradients)  # a reference may share its memory
    return Problem(hidden, leaf, ref_hidden, ref_weight, labels, shape.softcap, prompt)


def _laid_out(weight: Tensor, layout: str) -> Tensor:
    """Return the same numbers in another place, with other strides."""
    V, D = weight.shape
    if layout == "transposed":
        return weight.t().contiguous().t()
    if layout == "slice":
        return _within(weight, (V, D + 3), slice(1, D + 1))  # rows of an odd length from an odd address
    if layout == "every-other-row":
        return _within(weight, (V, 2 * D), slice(D))  # row 2 v of a (2 V, D) matrix
    return _within(weight, (V, 2 * D), slice(0, None, 2))


def _within(x: Tensor, size: tuple[int, ...], columns: slice) -> Tensor:
    """Copy `x` into the named columns of a larger tensor, and return that view of it."""
    return x.new_zeros(size)[..., columns].copy_(x)
