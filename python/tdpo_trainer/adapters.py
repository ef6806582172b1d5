"""Which tensors of a PEFT model are its adapters', and which the model's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def names_of_adapters(model: nn.Module, *, but: str | None = None) -> set[str]:
    """The names of the parameters and buffers of `model`'s adapters, as `named_parameters` has them.

    PEFT keeps them under the adapter's name in dictionaries of its own layers. The name by itself says nothing: an
    adapter may be named as a module of the model is.

    Args:
        but: an adapter to leave out.
    """
    adapters = set(getattr(model, "peft_config", {})) - {but}
    of_peft = ((name, x) for name, x in model.named_modules() if type(x).__module__.startswith("peft."))
    dictionaries = (
        (f"{outer}.{inner}".lstrip("."), part)
        for outer, layer in of_peft
        for inner, part in layer.named_children()
        if hasattr(part, "keys")
    )
    return {
        name for path, part in dictionaries for key in adapters & set(part.keys()) for name in _names(path, key, part)
    }


def _names(path: str, key: str, part: Any) -> Iterator[str]:
    if isinstance(part[key], Tensor):
        yield f"{path}.{key}"
    elif isinstance(part[key], nn.Module):
        for name, _ in (*part[key].named_parameters(), *part[key].named_buffers()):
            yield f"{path}.{key}.{name}"
