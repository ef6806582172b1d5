"""Say who is measured, by name. `provider` says what a provider is."""

from __future__ import annotations

from . import eager, floor, others, ours
from .provider import Provider

__all__ = ["BUDGETS", "FLOOR", "PROVIDERS", "Provider"]

FLOOR = "floor"
BUDGETS = {"0": 0, "all": 2**40, "1GiB": 2**30, "4GiB": 2**32}
BUDGETS |= {f"{n}MB": n * 10**6 for n in (32, 64, 128, 140, 192, 256, 300, 512)}
BACKENDS = {"ours": "auto", "fused": "fused", "tiled": "tiled", "naive": "naive"}
PROVIDERS: dict[str, Provider] = {
    FLOOR: floor.PROVIDER,
    "eager": eager.PROVIDER,
    "compiled": eager.COMPILED,
    **others.PROVIDERS,
    **{f"{name}@{label}": ours.provider(backend, budget)
       for name, backend in BACKENDS.items() for label, budget in BUDGETS.items()},
}  # fmt: skip
