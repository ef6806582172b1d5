"""``python -m tdpo_trainer``: the command `tdpo`, for launchers that start modules."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
