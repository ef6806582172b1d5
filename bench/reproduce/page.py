"""Write the page. Every number and every sentence about one comes from the records."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..report.tables import Table, markdown
from .figures import draw
from .settings import COMPARED, KL, NAMES, PUBLISHED, SOURCE
from .store import Record
from .summary import Spread, by_method, final, of_part, over_seeds, parities, reward_at, verdicts

PAGE = "reproduce.md"
FIRST = 100  # steps, before training has multiplied what rounding does
FRONTIER_KLS = (1.0, KL, 5.0)
AT_THE_END = [(head, final(name), digits) for head, name, digits in (
    ("reward", "reward", 3), ("KL", "kl", 2), ("SeqKL chosen", "chosen_kl", 2), ("SeqKL rejected", "rejected_kl", 2),
    ("margin", "margin", 2), ("accuracy", "accuracy", 3), ("accuracy without KL", "accuracy_without_kl", 3),
    ("entropy", "entropy", 2), ("distinct-1", "distinct_1", 4), ("distinct-2", "distinct_2", 3),
    ("distinct-3", "distinct_3", 3),
)]  # fmt: skip


def write(records: list[Record], folder: Path) -> Path:
    """Write ``reproduce.md`` and its figures."""
    ends = _grouped("at the last step", by_method(records), AT_THE_END, [])
    drawn = draw(records, folder, "; ".join(_places(records)))
    parts = ["# The paper in miniature", _setting(records[0])]
    parts += ["## Which orderings of the paper hold here", said(records), markdown([_orderings(records)])]
    parts += ["## The frontier", drawn["frontier"], markdown([_frontier(records)])]
    parts += ["## Where runs end", drawn["seqkl"], markdown([ends])]
    parts += ["## Parity", parity(records), markdown([_parity(records)])]
    parts += ["## Other learning rates", markdown([_rates(records)])]
    parts += ["## How it was measured", *_measured(records)]
    (folder / PAGE).write_text("\n\n".join(parts) + "\n")
    return folder / PAGE


def _setting(record: Record) -> str:
    s = record.settings
    return (
        f"A Llama of {record.parameters:,} parameters is trained from scratch on {s['reviews']:,} generated reviews "
        f"(scale `{s['scale']}`). For each of {len(s['seeds'])} seeds, {s['pairs']:,} pairs of its own samples are "
        "ranked by the known reward: the share of positive words of opinion less that of negative ones, from -1 to 1. "
        f"DPO, TDPO1 and TDPO2 start from that one checkpoint: beta {s['beta']:g}, AdamW at {s['lr']:g}, {s['steps']} "
        f"steps of {s['batch']} pairs. A seed is a set of pairs, their order and the draws of the measurements; within "
        "a seed all methods share them. Everything is measured on prompts that no model was trained on: "
        f"{s['samples']:,} samples and {s['held_out']:,} pairs at each look. KL is sampled, KL(policy || reference) "
        "per completion; SeqKL is the sum of the token KLs (reference || policy) of a pair's completion. In brackets: "
        "from the lowest to the highest seed. Nothing was tuned on what came out: learning rate and batch are the "
        "demo's."
    )


def said(records: list[Record]) -> str:
    """Say how many orderings hold, and which do not."""
    found = verdicts(records)
    others = [v for v in found if v.text != "holds"]
    lines = [f"Of {len(found)} orderings, {len(found) - len(others)} hold here in every seed."]
    return "\n".join([*lines, *(f"* {NAMES[v.ordering.quantity]}, {v.ordering.more} > {v.ordering.less}: {v.text}"
                                for v in others)])  # fmt: skip


def parity(records: list[Record]) -> str:
    """Say the largest difference in loss, also for the terminal."""
    ours = [pair for pair in parities(records) if pair.one.run.loss != PUBLISHED]
    worst = max(ours, key=lambda pair: pair.largest)
    return (
        f"{COMPARED}, seed {worst.one.run.seed}, {len(worst.one.losses)} steps. Largest difference in loss per step "
        f"from the published formula: {worst.largest:.1e}, of {worst.one.run.loss} in {worst.one.run.dtype} at step "
        f"{worst.step}; in the first {FIRST} steps {max(pair.within(FIRST) for pair in ours):.1e}. The last line "
        "of the table is what rounding alone does to the published formula, for training multiplies it. (The model's "
        "norms are computed in float32 whatever its dtype: float64 runs part once one of those rounds otherwise.)"
    )


def _measured(records: list[Record]) -> list[str]:
    seconds = sum(record.seconds for record in records)
    return [f"{len(records)} runs took {seconds / 60:.1f} minutes together, as each one timed itself.",
            "\n".join(f"* {place}" for place in _places(records)),
            f"The paper's figures: {SOURCE}; margins are differences of what was read, and what is \"in words\" "
            "is the caption's. `python -m bench.reproduce` makes this page anew."]  # fmt: skip


def _places(records: Iterable[Record]) -> list[str]:
    """Return each set of conditions once, in order."""
    return list(dict.fromkeys(record.conditions.said for record in records))


def _orderings(records: list[Record]) -> Table:
    head = ("quantity", "the paper's ordering", "paper", "here", "difference here", "verdict")
    cells = []
    for v in verdicts(records):
        o, (more, less, apart) = v.ordering, v.spreads if v.pairs else (None,) * 3
        here = f"{more.mean:.3g}, {less.mean:.3g}" if v.pairs else "-"
        cells.append((NAMES[o.quantity], f"{o.more} > {o.less}", o.figures, here, _text(apart, 3), v.text))
    return Table("the paper's orderings, held against these runs", head, cells,
                 ["Here: means over seeds. Difference: of the two methods within a seed."])  # fmt: skip


def _frontier(records: list[Record]) -> Table:
    values = [(f"reward at KL {kl:g}", reward_at(kl), 3) for kl in FRONTIER_KLS]
    notes = ["-: not all seeds came to it."]
    return _grouped("reward where a run first comes to a KL", by_method(records), values, notes)


def _rates(records: list[Record]) -> Table:
    """Show other learning rates beside the first seed's run at the rate of all others."""
    rated = of_part(records, "rate")
    methods, seed = {r.run.method for r in rated}, rated[0].run.seed
    usual = [r for r in of_part(records, "frontier") if r.run.method in methods and r.run.seed == seed]
    shown = sorted([*rated, *usual], key=lambda r: (r.run.method, r.run.lr))
    groups = {f"{r.run.method} at {r.run.lr:g}": [r] for r in shown}
    return _grouped(f"at the last step, by learning rate, seed {seed}", groups, AT_THE_END, [])


def _grouped(title: str, groups: dict[str, list[Record]], values: list, notes: list[str]) -> Table:
    cells = [(name, *(_text(over_seeds(some, value), digits) for _, value, digits in values))
             for name, some in groups.items()]  # fmt: skip
    return Table(title, ("method", *(head for head, _, _ in values)), cells, notes)


def _parity(records: list[Record]) -> Table:
    head = ("runs", "first step", f"first {FIRST} steps", "largest", "at step")
    cells = [(p.name, *(f"{x:.1e}" for x in (p.within(1), p.within(FIRST), p.largest)), f"{p.step}")
             for p in parities(records)]  # fmt: skip
    return Table("losses of runs that should be the same", head, cells)


def _text(found: Spread | None, digits: int) -> str:
    return found.text(digits) if found else "-"
