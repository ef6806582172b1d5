"""What a campaign found, taken into the checkout: rows into ``bench/results/<device>.jsonl``, tables to their place.

Needs no GPU: a campaign's folder may come from another machine. Nothing that is dry, and nothing twice.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from .plan import ROOT, Facts, source
from .store import Record, Store

RESULTS = ROOT / "bench" / "results"


def rows(store: Store, commit: str, folder: Path = RESULTS) -> dict[Path, int]:
    """Appends what is new, and says how many rows to which file. Rows measured outside of version control get
    `commit` if it names the source that is here, the source that they were measured with."""
    added: dict[Path, int] = {}
    for record in store.records.values():
        if record["stage"] != "bench" or record["configuration"]["dry"]:
            continue
        path = folder / f"{_name(record['configuration']['device'])}.jsonl"
        known = [_measured(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
        new = [row for row in record["facts"].get("rows", []) if _measured(row) not in known]
        if new:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.writelines(json.dumps(_named(row, record, commit)) + "\n" for row in new)
            added[path] = added.get(path, 0) + len(new)
    return added


def _measured(row: Facts) -> str:
    """A row whatever its commit is called."""
    return json.dumps(row | {"conditions": row["conditions"] | {"commit": ""}})


def _named(row: Facts, record: Record, commit: str) -> Facts:
    where = row["conditions"]
    known = not where["commit"].startswith("source-") or record["configuration"]["source"] != source()
    return row if known or not commit else row | {"conditions": where | {"commit": commit}}


def _name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
