"""What came out of the source that is here, as tables: of each item its last record, of each stage how it went."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .plan import STAGES, Facts, Settings
from .store import Record, Store

DRY = "DRY RUN: a CPU, tiny shapes, Triton's interpreter. No number below means anything."


def summary(store: Store, dry: bool, source: str) -> str:
    here = {"dry": dry, "source": source}
    shown = [r for r in store.records.values() if here.items() <= r["configuration"].items()]
    latest = {(r["stage"], r["item"]): r for r in shown}
    by_stage = {stage: [r for (s, _), r in latest.items() if s == stage] for stage in STAGES}
    parts = [DRY] if dry else []
    if others := sum(r["configuration"]["dry"] == dry for r in store.records.values()) - len(shown):
        parts += [f"{others} records are of other sources and not shown."]
    parts += [_stages(by_stage)]
    parts += [text for stage, write in WRITERS.items() if (text := write(by_stage[stage]))]
    return "\n\n".join(parts) + "\n"


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    cells = [[str(cell).replace("|", "/") for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (n + 2) for n in widths) + "|", *lines[1:]])


def _stages(by_stage: dict[str, list[Record]]) -> str:
    rows = []
    for stage, records in by_stage.items():
        counts = [sum(r["status"] == status for r in records) for status in ("ok", "failed", "skipped", "stopped")]
        if records:
            rows.append((stage, *counts, f"{sum(r['seconds'] for r in records):.1f} s"))
    table = _table(("stage", "ok", "failed", "skipped", "stopped", "time"), rows)
    told = [
        f"* {stage}, {r['item']}: {r['status']}: {r['message'].splitlines()[0][:200]}"
        for stage, records in by_stage.items()
        for r in records
        if r["status"] in ("failed", "stopped")
    ]
    reasons = {(stage, r["message"]) for stage, rs in by_stage.items() for r in rs if r["status"] == "skipped"}
    told += [f"* {stage}, skipped: {message}" for stage, message in sorted(reasons)]
    return "\n".join([table, "", *told]).rstrip()


def _env(records: list[Record]) -> str:
    lines = [f"* {name}: {_plain(value)}" for r in records for name, value in r["facts"].items()]
    return "\n".join(lines)


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(x)}" for name, x in value.items())
    if isinstance(value, list):
        return " to ".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _verify(records: list[Record]) -> str:
    """Of each backend and dtype the line closest to, or furthest over, what is allowed."""
    lines = [line for r in records for line in r["facts"].get("lines", [])]
    worst: dict[tuple[str, str], Facts] = {}
    for line in lines:
        key = line["backend"], line["dtype"]
        if key not in worst or _strain(line) > _strain(worst[key]):
            worst[key] = line
    rows = [
        (*key, x["problem"], x["budget"], x["quantity"], *(f"{x[n]:.1e}" for n in ("error", "plain", "allowed")))
        for key, x in worst.items()
    ]
    head = ("backend", "dtype", "worst problem", "budget", "quantity", "error", "plain", "allowed")
    return _table(head, rows) if rows else ""


def _strain(line: Facts) -> float:
    return line["error"] / line["allowed"]


def _memory(records: list[Record]) -> str:
    rows = [
        (r["item"], size(f["peak"]), size(f["allowed"]), size(f["tokens x vocabulary"]), r["status"])
        for r in records
        if (f := r["facts"])
    ]
    return _table(("memory", "peak above in- and outputs", "allowed", "one fp32 [T, V]", ""), rows) if rows else ""


def _tune(records: list[Record]) -> str:
    rows = []
    for f in (r["facts"] for r in records if r["facts"].get("results")):
        best, *rest = f["results"]
        present = next((x for x in f["results"] if x["name"] == f["present"]), best)
        second = f"{rest[0]['name']} {rest[0]['ms']:.2f}" if rest else "-"
        rows.append((
            _case(f), f["D"], best["name"], f"{best['ms']:.2f}", f"{best['ratio']:.2f}", second,
            f"{present['name']} {present['ms']:.2f}", len(f["results"]), len(f["dropped"]),
        ))  # fmt: skip
    head = ("kernel", "D", "winner", "ms", "/ gemm", "runner-up, ms", "heuristic, ms", "sound", "dropped")
    return _table(head, rows) if rows else ""


def _case(facts: Facts) -> str:
    case = facts["case"]
    return " ".join([case["kernel"], *(name for name in ("staged", "one_head") if case[name])])


def _bench(records: list[Record]) -> str:
    rows = []
    for row in (row for r in records for row in r["facts"].get("rows", [])):
        budget = "" if row["budget_bytes"] is None else "@0" if row["budget_bytes"] == 0 else "@all"
        timed = ("-", "-") if row["ratio"] is None else (f"{row['ratio'][0]:.2f}", f"{row['seconds'][0] * 1e3:.2f}")
        error = "-" if row["error"] is None else f"{row['error']:.1e}"
        note = ("RED " if row["red"] else "") + (row["note"] or "")
        memory = size(row["peak_extra_bytes"])
        rows.append((row["shape"], row["T"], row["provider"] + budget, *timed, memory, error, note[:80]))
    head = ("shape, pass", "T", "who", "/ gemm", "ms", "extra memory", "error", "")
    return _table(head, rows) if rows else ""


def _profile(records: list[Record]) -> str:
    return "\n".join(
        f"* {r['item']}: " + "; ".join(f"{name[:48]} x{count} {us / 1e3:.2f} ms" for name, count, us in f["top"][:5])
        for r in records
        if (f := r["facts"])
    )


def size(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


WRITERS = {
    "env": _env, "verify": _verify, "memory": _memory, "tune": _tune, "bench": _bench, "profile": _profile,
}  # fmt: skip


def write(store: Store, settings: Settings) -> str:
    text = summary(store, settings.dry, settings.source)
    Path(settings.out, "dry-summary.md" if settings.dry else "summary.md").write_text(text)
    return text
