"""``python -m tdpo_trainer``: the command `tdpo`, for launchers that start modules."""

from .cli import command_line

if __name__ == "__main__":
    command_line()
