"""The paper in miniature: the whole path at its quickest, killed and gone on with; what is refused; what is said."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

for needed in ("transformers", "tqdm", "matplotlib"):
    pytest.importorskip(needed)

from bench import reproduce  # noqa: E402
from bench.reproduce import __main__ as command  # noqa: E402
from bench.reproduce import page, settings, summary  # noqa: E402
from bench.reproduce import settings as paper  # noqa: E402
from bench.reproduce.runs import published_loss  # noqa: E402
from bench.reproduce.settings import METHODS, SCALES, Run, plan  # noqa: E402
from bench.reproduce.store import Mixed, Point, Record, Store  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
QUICK = SCALES["quick"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A folder after a kill in the middle, and the files of the runs that were finished."""
    out = tmp_path_factory.mktemp("reproduce")
    process = subprocess.Popen([sys.executable, "-m", "bench.reproduce", "--quick", "--out", str(out)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    until = time.monotonic() + 60
    while len(list(out.glob("runs/*.jsonl"))) < 3 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return out, {path.name: path.read_bytes() for path in out.glob("runs/*.jsonl")}


@pytest.fixture(scope="module")
def quick(killed: tuple[Path, dict[str, bytes]]) -> Path:
    """The same folder, gone on with by the same command to its end."""
    out, _ = killed
    assert command.main(["--quick", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def records(quick: Path) -> list[Record]:
    return Store(quick, QUICK).load()


def test_every_run_is_there_and_finished_ones_were_kept(quick, killed):
    _, before = killed
    assert 3 <= len(before) < 22
    after = {path.name: path.read_bytes() for path in quick.glob("runs/*.jsonl")}
    assert set(after) == {f"{run.name}.jsonl" for run in plan(QUICK, ["tiled", "naive"])}
    assert {name: after[name] for name in before} == before


def test_the_published_formula_trains_to_the_same_losses(records):
    compared = summary.parities(records)
    assert {(p.one.run.loss, p.one.run.dtype) for p in compared} >= {("tiled", "float32"), ("naive", "float64")}
    for pair in compared:
        assert pair.largest < (1e-5 if "float32" in (pair.one.run.dtype, pair.other.run.dtype) else 1e-12)


def test_the_page_has_its_figures_and_runs_again_from_what_is_there(quick, capsys):
    text = (quick / page.PAGE).read_text()
    pictures = re.findall(r'src(?:set)?="([^"]+)"', text)
    assert len(pictures) == 4 and all((quick / picture).stat().st_size > 10_000 for picture in pictures)
    world = (quick / "world.pt").read_bytes()
    (quick / "world.pt").unlink()  # as in a checkout
    assert command.main(["--quick", "--out", str(quick)]) == 0
    assert not (quick / "world.pt").exists() and (quick / page.PAGE).read_text() == text
    assert "Largest difference in loss per step" in capsys.readouterr().out
    (quick / "world.pt").write_bytes(world)


def test_other_settings_are_refused_by_name_and_nothing_is_touched(quick, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in quick.rglob("*") if path.is_file()}
    monkeypatch.setitem(settings.SCALES, "quick", replace(QUICK, lr=1e-3))
    assert command.main(["--quick", "--out", str(quick)]) == 2
    error = capsys.readouterr().err
    assert "{'lr': 0.0003}" in error and "{'lr': 0.001}" in error and "--out" in error and "width" not in error
    assert {path: path.read_bytes() for path in quick.rglob("*") if path.is_file()} == before


def test_another_checkpoint_is_refused(records, tmp_path):
    store = Store(tmp_path, QUICK)
    store.add(records[0])
    store.add(replace(records[1], checkpoint="0ther"))
    with pytest.raises(Mixed, match="0ther"):
        store.load()
    with pytest.raises(Mixed, match="n3w"):
        store.load("n3w")


def record(method: str, seed: int = 0, **last: float) -> Record:
    """A run that ends with these values, and with KL and reward on a straight line from 0."""
    values = dict.fromkeys(Point.__dataclass_fields__, 1.0) | last
    start = Point(**values | {"step": 0, "kl": 0.0, "reward": 0.0})
    run = Run("frontier", method, seed, QUICK.lr)
    return Record(run, QUICK.as_json(), "c", 1, None, 1.0, [start, Point(**values)], [1.0])


def as_in_the_paper(seed: int = 0, **instead: dict[str, float]) -> list[Record]:
    """Runs with the paper's own figures."""
    reward = paper.REWARD | {"TDPO1": 0.9, "TDPO2 0.1": 0.9, "TDPO2 0.3": 0.95}
    return [record(m, seed, **dict(chosen_kl=paper.CHOSEN[m], rejected_kl=paper.REJECTED[m], reward=reward[m],
                                   kl=paper.KL) | instead.get(m, {})) for m in METHODS]  # fmt: skip


def test_the_paper_s_own_figures_hold_in_every_ordering():
    found = summary.verdicts(as_in_the_paper())
    assert len(found) == 19 and {v.text for v in found} == {"holds"}
    assert page.said(as_in_the_paper()) == "Of 19 orderings, 19 hold here in every seed."


def test_an_ordering_that_is_turned_round_is_said_not_to_hold():
    turned = {"chosen_kl": 51.0, "rejected_kl": 72.0}  # the margin is what it was
    said = page.said(as_in_the_paper(DPO=turned))
    assert "18 hold here in every seed" in said and "* SeqKL chosen, TDPO1 > DPO: does not hold" in said
    both = as_in_the_paper() + as_in_the_paper(1, DPO=turned)
    assert "* SeqKL chosen, TDPO1 > DPO: in 1 of 2 seeds" in page.said(both)


@pytest.mark.parametrize("method", METHODS)
def test_published_loss_is_the_library_s_with_its_gradient(method):
    assert str(reproduce.EXAMPLES) in sys.path
    from pairs import Pair, collate
    from tdpo_loop import tdpo_loss
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    policy, reference = (LlamaForCausalLM(LlamaConfig(vocab_size=20, initializer_range=0.3, **sizes)).double()
                         for _ in range(2))  # fmt: skip
    batch = collate([Pair((5, 6), (7, 1, 9), (8,)), Pair((5,), (9,), (2, 3, 1))], 0, torch.device("cpu"))
    outs, grads = [], []
    for loss in (published_loss, tdpo_loss):
        policy.zero_grad()
        outs.append(loss(policy, reference, batch, beta=0.7, **METHODS[method]))
        outs[-1].loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    torch.testing.assert_close(outs[0].loss, outs[1].loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
