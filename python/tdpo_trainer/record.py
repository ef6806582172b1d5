"""Leave on disk what a run did: `METRICS`, `CURVES`, `REPORT`, and what the model card says of TDPO."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tdpo_kernels import __version__

from .fingerprint import COLUMNS
from .metrics import TOKENS_SEEN
from .step import LossOptions

METRICS, CURVES, CARD, REPORT = "metrics.jsonl", "curves.png", "README.md", "data_report.json"
SETTINGS = "TDPO settings"  # under this name a checkpoint keeps what the run was given
PROBED = 1000  # pairs, about, by which the data are known again
COLOURS = {"": "#555555", "chosen": "#1f77b4", "rejected": "#d62728"}


class Record(TrainerCallback):
    """Write each logged line to `METRICS` in the output folder, `CURVES` at the end of training, `REPORT` before it.

    A resumed run goes on where its checkpoint was made, and says which settings differ from the checkpoint's.
    """

    def __init__(self, options: LossOptions, pairs: object, report: Mapping[str, Any] | None = None) -> None:
        self.options, self.report = options, report
        self.settings = {
            "variant": options.variant, "alpha": options.alpha_used, "beta": options.beta,
            "sft_weight": options.sft_weight or None, "length_normalized": options.length_normalized or None,
            "data": _data(pairs),
        }  # fmt: skip

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        before = state.stateful_callbacks.get(SETTINGS, self.settings)
        state.stateful_callbacks[SETTINGS] = self.settings
        if not state.is_world_process_zero:
            return
        now = self.settings
        changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
        if changed:
            print(f"TDPO: the checkpoint is of a run with other settings: {', '.join(changed)}", flush=True)
        _write(Path(args.output_dir), state.log_history, "w")
        if self.report:
            Path(args.output_dir, REPORT).write_text(json.dumps(self.report, indent=1))

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            _write(Path(args.output_dir), state.log_history[-1:], "a")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and _can_draw() and any("loss" in entry for entry in state.log_history):
            plot(state.log_history, self.options.beta, Path(args.output_dir) / CURVES)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.on_save(args, state, control)
        if state.is_world_process_zero and not _can_draw():
            print(f"TDPO: {CURVES} is left out: matplotlib is not installed", flush=True)

    def add_to_card(self, args: Any, kept: Mapping[str, Any]) -> None:
        """Add to the model card in the output folder what TDPO trained with, and the curves."""
        rows = {**self.settings, "learning rate": f"{args.learning_rate:g}", "tokens seen": f"{kept[TOKENS_SEEN]:,}"}
        rows["tdpo-kernels"] = __version__
        table = "".join(f"| {name} | {value} |\n" for name, value in rows.items() if value is not None)
        curves = f"\n![Loss, rewards with and without the KL, KL and accuracy by step]({CURVES})\n"
        with open(Path(args.output_dir) / CARD, "a") as card:
            shown = curves if _can_draw() else ""
            card.write(f"\n\n## TDPO\n\n| setting | value |\n|---|---|\n{table}{shown}")


def _can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _data(pairs: Any) -> str:
    """Return how many pairs there are, and a digest of about `PROBED` of them; of a stream, that it is one."""
    if not hasattr(pairs, "__len__"):
        return "a stream"
    digest = blake2b(digest_size=4)
    if hasattr(pairs, "select_columns"):  # pictures beside them are not decoded
        pairs = pairs.select_columns([name for name in COLUMNS if name in pairs.column_names])
    for row in range(0, len(pairs), max(1, len(pairs) // PROBED)):
        digest.update(repr([pairs[row].get(name) for name in COLUMNS]).encode())
    return f"{len(pairs)} pairs ({digest.hexdigest()})"


def _write(folder: Path, entries: Iterable[Mapping[str, Any]], mode: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / METRICS, mode) as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def plot(history: Iterable[Mapping[str, float]], beta: float, path: Path) -> None:
    """Draw what a run logged: training as lines, each evaluation set as dots. KLs are in nats a completion."""
    from matplotlib.figure import Figure  # the figure alone chooses no window system

    entries = [_with_log_ratios(entry, beta) for entry in history]
    panels = {
        "loss": ("loss",), "rewards (with the KL)": ("rewards/chosen", "rewards/rejected"),
        "rewards without the KL": ("ratio/chosen", "ratio/rejected"),
        "forward KL, nats": ("kl/chosen", "kl/rejected"), "reward accuracy": ("rewards/accuracies",),
    }  # fmt: skip
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in names:
            _draw(axis, entries, name, name.partition("/")[2] if len(names) > 1 else "")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=100)


def _draw(axis: Any, entries: list[dict[str, float]], name: str, which: str) -> None:
    ours = {key for entry in entries for key in entry if key == name or key.endswith(f"_{name}")}
    for logged in sorted(ours - {f"train_{name}"}):  # which is the mean over the run
        points = [(entry["step"], entry[logged]) for entry in entries if logged in entry]
        prefix = logged.removesuffix(name).rstrip("_")
        label = " ".join(filter(None, (prefix or "training", which)))
        axis.plot(*zip(*points, strict=True), "o" if prefix else "-", color=COLOURS[which], label=label, ms=4, lw=1.2)


def _with_log_ratios(entry: Mapping[str, float], beta: float) -> dict[str, float]:
    """Add rewards as DPO's are, without the KL, under ``ratio/``."""
    found = dict(entry)
    for name, reward in entry.items():
        prefix, found_one, which = name.partition("rewards/")
        if found_one and which in ("chosen", "rejected"):
            found[f"{prefix}ratio/{which}"] = reward - beta * entry[f"{prefix}kl/{which}"]
    return found
