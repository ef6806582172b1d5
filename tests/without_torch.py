"""``python tests/without_torch.py ARGUMENTS``: the command `kernels` where torch is not installed, only triton.

The package's own ``__init__`` imports torch; what is compiled does not need it.
"""

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    sys.path.insert(0, str(ROOT))
    sys.modules["torch"] = None
    package = types.ModuleType("tdpo_kernels")
    package.__path__ = [str(ROOT / "tdpo_kernels")]
    sys.modules["tdpo_kernels"] = package
    from tdpo_kernels import kernels

    return kernels.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
