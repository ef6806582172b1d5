"""The paper in miniature: DPO, TDPO1 and TDPO2 trained from one checkpoint, measured along the way, on one frontier.

``python -m bench.reproduce`` (`make reproduce`) goes on where it was interrupted. The world is the demo's
(`python/examples`): reviews out of a small grammar, whose sentiment a lexicon knows. To read:

==================  ==========================================================================
`settings`          methods, sizes, and which runs there are
`world`             what all runs start from: a fine-tuned model, prompts, ranked pairs
`training`          one run; `measure` looks at it on the way, `published` is the other loss
`store`             finished runs, a file each; what does not belong together is refused
`paper`             the paper's figures, and the orderings they say
`summary`           runs as numbers: means, spreads, verdicts
`page`, `figures`   the summary as Markdown and pictures
==================  ==========================================================================
"""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "python" / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(0, str(EXAMPLES))  # the demo is a folder of scripts
