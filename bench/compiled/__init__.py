"""Compile every shipped configuration of a kernel, without a GPU: ``python -m bench.compiled``.

Triton is all that it needs: where torch is not installed, the library's own ``__init__``, which imports it, is not run.
"""

import importlib.util
import sys
import types
from pathlib import Path

if importlib.util.find_spec("torch") is None:
    library = types.ModuleType("tdpo_kernels")
    library.__path__ = [str(Path(__file__).resolve().parents[2] / "tdpo_kernels")]
    sys.modules["tdpo_kernels"] = library
