"""Running a function where a wrapper runs a model: within its hooks, in the place of the model's forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_ABSENT = object()


@contextmanager
def instead(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """`module.name` is `value` for a while, on this one instance."""
    own = module.__dict__.get(name, _ABSENT)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if own is _ABSENT:
            del module.__dict__[name]
        else:
            module.__dict__[name] = own


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` without dropout or other noise of training, and without a draw of random numbers; then as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def redirect(wrapped: nn.Module, inner: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`wrapped(*args, **kwargs)`, with `function` in the place of `inner`'s forward.

    DDP, FSDP1, FSDP2 and ZeRO-3 gather weights and arm their gradient hooks around the forward of what they wrap, and
    look for tensors in what it returns: in tuples and dicts, so `function` returns one of those, or a tensor. While
    `function` runs, `inner.forward` is the original again (with the autocast that accelerate puts there): call that,
    not `inner`, whose own hooks are already running.

    Args:
        wrapped: what the trainer calls: a wrapper around `inner`, or `inner` itself (FSDP2 shards in place).
        inner: the model within.

    Raises:
        TypeError: for `torch.nn.DataParallel`, which calls copies of `inner`.
        RuntimeError: calling `wrapped` did not call `inner`.
    """
    if isinstance(wrapped, nn.DataParallel):
        raise TypeError("wrapped: got a DataParallel, which calls copies; wanted one process per device (torchrun)")
    calls = []

    def once(*args: Any, **kwargs: Any) -> Any:
        calls.append(function)
        with instead(inner, "forward", own):
            return function(*args, **kwargs)

    own = inner.forward
    with instead(inner, "forward", once):
        out = wrapped(*args, **kwargs)
    if not calls:
        raise RuntimeError(f"inner: calling the {type(wrapped).__name__} did not call the {type(inner).__name__}")
    return out


def refuse_compiled(*modules: nn.Module) -> None:
    """Raises TypeError for a model whose whole forward is compiled: nothing could be put in its place.

    What it is made of may be compiled, its layers or its backbone.
    """
    for module in modules:
        base = module.get_base_model() if hasattr(module, "get_base_model") else module
        if any(map(_is_compiled, (module, base))):
            raise TypeError(
                f"model: got a {type(base).__name__} compiled as a whole (torch.compile, Module.compile), wanted its "
                "parts compiled: model.model.compile(), or layer.compile() of each layer"
            )


def _is_compiled(module: nn.Module) -> bool:
    whole = hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
    return whole or hasattr(module.forward, "get_compiler_config")
