"""``python -m bench.gpu.tiny BACKEND DEVICE``: one small forward and backward of every variant of the kernels, for a
checker to look at."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpo_kernels import LMHead, token_stats

from .device import every_backend

EVERYTHING = 2**40
T, V = 70, 387  # ragged


@dataclass(frozen=True)
class Variant:
    """`adorned`: heads with bias, scale and softcap. `packed`: not every row counts. D = 64 is aligned, 60 is not."""

    dtype: str
    budget: int = 0
    D: int = 64
    adorned: bool = False
    packed: bool = False


VARIANTS = (
    Variant("float16"),
    Variant("float16", EVERYTHING),
    Variant("float16", D=60),
    Variant("float32", adorned=True, packed=True),
    Variant("float32", EVERYTHING, adorned=True, packed=True),
    Variant("bfloat16", EVERYTHING, adorned=True),
)


def run(backend: str, device: str, variant: Variant) -> list[Tensor]:
    """Statistics and gradients."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, getattr(torch, variant.dtype))

    hidden, ref_hidden = normal(T, variant.D), normal(T, variant.D)
    weight, ref_weight = normal(V, variant.D) / 8, normal(V, variant.D) / 8
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    head, ref_head = LMHead(weight), LMHead(ref_weight)
    if variant.adorned:
        leaves.append(normal(V).requires_grad_())
        head, ref_head = LMHead(weight, leaves[2], 0.9, 20.0), LMHead(ref_weight, normal(V), 1.1, 30.0)
    labels = torch.randint(V, (T,), generator=generator)
    if variant.packed:
        labels[::3] = -100
    options = dict(shift=False, backend=backend, memory_budget=variant.budget)
    out = token_stats(hidden, head, ref_hidden, ref_head, labels.to(device), **options)
    loss = (out.logp * normal(T)).sum() + (out.kl * normal(T)).sum()
    return [out.logp, out.ref_logp, out.kl, *torch.autograd.grad(loss, leaves)]


def main(backend: str, device: str) -> None:
    every_backend()
    for variant in VARIANTS:
        if device == "cpu" and variant.dtype == "bfloat16":
            continue  # not under the interpreter
        print(f"variant {variant}", flush=True)
        if not all(x.isfinite().all() for x in run(backend, device, variant)):
            raise SystemExit("something is not finite")


if __name__ == "__main__":
    main(*sys.argv[1:])
