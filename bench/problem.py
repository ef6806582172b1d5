"""One TDPO step's inputs. Everybody is given the same ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .shapes import Shape

BETA, ALPHA = 0.1, 0.5


@dataclass(frozen=True, eq=False)
class Problem:
    """TDPO2, trainable head, frozen reference with a head of its own, every label valid and already shifted."""

    hidden: Tensor  # (2P, L, D), a leaf that wants a gradient
    weight: Tensor  # (V, D), likewise
    ref_hidden: Tensor
    ref_weight: Tensor
    labels: Tensor  # (2P, L)

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def gradients(self) -> dict[str, Tensor]:
        return {"hidden": self.hidden.grad, "weight": self.weight.grad}

    def double(self) -> Problem:
        """The same numbers in float64, for the gate."""
        hidden, weight = (x.detach().double().requires_grad_() for x in (self.hidden, self.weight))
        return Problem(hidden, weight, self.ref_hidden.double(), self.ref_weight.double(), self.labels)


def make_problem(shape: Shape, dtype: str, seed: int = 0) -> Problem:
    """Logits of unit variance, and a reference as near as in training: a KL of about 0.01 nats per token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=getattr(torch, dtype)).mul_(scale)

    tokens = (2 * shape.pairs, shape.T // (2 * shape.pairs))
    hidden, weight = normal(*tokens, shape.D, scale=1.0), normal(shape.V, shape.D, scale=shape.D**-0.5)
    ref_hidden = normal(*tokens, shape.D, scale=0.1).add_(hidden)
    ref_weight = normal(shape.V, shape.D, scale=0.1 * shape.D**-0.5).add_(weight)
    labels = torch.randint(shape.V, tokens, generator=generator)
    return Problem(hidden.requires_grad_(), weight.requires_grad_(), ref_hidden, ref_weight, labels)
