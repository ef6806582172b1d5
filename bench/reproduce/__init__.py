"""Repeat the paper in miniature: DPO, TDPO1 and TDPO2 from one checkpoint, measured along the way, on one frontier.

``python -m bench.reproduce`` (`make reproduce`) goes on where it was interrupted. The world is the demo's
(`python/examples`): reviews out of a small grammar, whose sentiment a lexicon knows. `settings` says which runs there
are and what the paper has, `runs` makes and measures them, `store` keeps them; `summary`, `page`, `figures` show them.
"""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "python" / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))  # the demo is a folder of scripts
