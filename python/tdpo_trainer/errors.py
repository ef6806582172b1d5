"""Tell what the person who gave the options can mend, said in one line, from a bug, which keeps its traceback."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from jinja2 import TemplateError
from safetensors import SafetensorError
from yaml import YAMLError

# What packages raise for options, and for files behind them, that are not as they should be. Bugs rarely raise these.
OF_OPTIONS = (ValueError, OSError, ImportError, YAMLError, SafetensorError, TemplateError)
LONGEST = 800


class UsageError(ValueError):
    """Options, or files that they name, are not what is wanted; the message is one line for who gave them."""


@contextmanager
def said_in_one_line(about: str, kinds: tuple[type[Exception], ...] = OF_OPTIONS) -> Iterator[None]:
    """Raise a UsageError in place of an error of these `kinds`, with what it is `about`."""
    try:
        yield
    except kinds as error:
        raise UsageError(f"{about}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return textwrap.shorten(text, LONGEST, placeholder=" ...")
