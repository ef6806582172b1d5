"""TDPO in trainers: from a Hugging Face model and preference pairs to a finished run."""

from importlib import import_module
from typing import Any

_MODULES = {"TDPOConfig": "config", "TDPOTrainer": "trainer", "PlainTDPOTrainer": "plain"}  # the first two need TRL
__all__ = ["PlainTDPOTrainer", "TDPOConfig", "TDPOTrainer"]  # noqa: F822


def __getattr__(name: str) -> Any:
    """Return one of the trainers, imported when it is first asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
