"""``python -m bench.gpu --out DIR``: the campaign, or as much of it as there is time for; the same command goes on.

Records, log and summary are in DIR. ``--dry`` goes through all of it on a CPU; ``--collect`` takes DIR's rows and
tables into this checkout. The exit status is 0 if nothing failed, 1 if something did.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from .driver import Driver, guarded
from .plan import ROOT, STAGES, Settings, source
from .store import Store


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench.gpu", description=__doc__)
    p.add_argument("--out", type=Path, required=True, help="the folder of records, log and summary")
    p.add_argument("--stages", type=_stages, default=STAGES, help=f"of {','.join(STAGES)}; default: all")
    p.add_argument("--only", default="", help="items whose name contains this")
    p.add_argument("--dry", action="store_true", help="on a CPU, tiny shapes, through Triton's interpreter")
    p.add_argument("--minutes", type=float, default=9.0, help="stop before so many have passed; default: %(default)s")
    p.add_argument("--again", action="store_true", help="also what failed or was skipped before")
    p.add_argument("--commit", default="", help="what results are said to belong to where there is no git")
    p.add_argument("--collect", action="store_true", help="only take DIR's rows and tables into this checkout")
    return p


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    commit, dirty = version(options.commit)
    deadline = time.time() + 60 * options.minutes
    settings = Settings(
        str(out), options.stages, options.dry, deadline, commit, dirty, source(), options.only, options.again
    )
    if options.collect:
        _collect_rows(settings)
        _collect_tables(settings)
        return 0
    store = Store(out)
    driver = Driver(settings, store)
    driver.say(
        f"{', '.join(settings.stages)}; commit {commit}{' + changes' if dirty else ''}, source {settings.source}"
    )
    finished = guarded(driver.run, driver)
    from .summary import write

    print("\n" + write(store, settings))
    if driver.stopped:
        print(f"time ran out during {driver.stopped}; the same command goes on with it")
    if driver.left:
        print(f"{len(driver.left)} items left for the next run, from {driver.left[0]} on")
    if finished and not settings.dry:
        _collect_rows(settings)  # the worker has seen to the tables
    print("\n".join([f"FAILED {name}" for name in driver.failed]) or "nothing failed")
    return int(bool(driver.failed) or not finished)


def version(given: str) -> tuple[str, bool]:
    """The commit and whether there are changes; without git what was given, or the source's digest."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return given or f"source-{source()}", False
    ours = (":(exclude)bench/results", ":(exclude)tdpo_kernels/tuning/tables")  # what a campaign writes itself
    return commit, bool(_git("status", "--porcelain", "--", "tdpo_kernels", "bench", *ours))


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _collect_rows(settings: Settings) -> None:
    from . import collect

    commit = "" if settings.dirty or settings.commit.startswith("source-") else settings.commit
    for path, count in collect.rows(Store(Path(settings.out)), commit).items():
        print(f"{count} rows added to {path.relative_to(ROOT)}")


def _collect_tables(settings: Settings) -> None:
    from .tables import install

    for path in install(settings):
        print(f"table {path.relative_to(ROOT)}")


def _stages(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := [name for name in names if name not in STAGES]:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}, wanted some of {', '.join(STAGES)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
