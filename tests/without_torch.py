"""``python tests/without_torch.py ARGUMENTS``: the command `kernels` where torch is not installed, only triton.

The package's own ``__init__`` imports torch; what is compiled does not need it. Processes that compile begin with this
file too.
"""

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

sys.path.insert(0, str(ROOT))
sys.modules["torch"] = None
package = types.ModuleType("tdpo_kernels")
package.__path__ = [str(ROOT / "tdpo_kernels")]
sys.modules["tdpo_kernels"] = package

if __name__ == "__main__":
    from tdpo_kernels import kernels

    sys.exit(kernels.main(sys.argv[1:]))
