"""The benchmark works: it runs, refuses to time what is wrong, counts what it says, and goes on where it ended."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("tqdm")

from bench import __main__ as command  # noqa: E402
from bench import drift, gate, measure, memory, rows, step  # noqa: E402
from bench import energy as energies  # noqa: E402
from bench import roofline as roof  # noqa: E402
from bench import run as running  # noqa: E402
from bench.conditions import conditions  # noqa: E402
from bench.problem import IGNORE, make_problem  # noqa: E402
from bench.providers import PROVIDERS, Step, eager, linear_ce  # noqa: E402
from bench.providers.provider import Provider  # noqa: E402
from bench.report import tables as tabled  # noqa: E402
from bench.roofline import Ceiling  # noqa: E402
from bench.shapes import MODELS, SHAPES  # noqa: E402

CPU, CEILING = torch.device("cpu"), Ceiling(1e12, 1e10)
TINY = replace(SHAPES["tiny"], calls=1)
SETTINGS = {
    "plain": {}, "prompts": {"valid": 0.25}, "frozen": {"trainable": False}, "one-head": {"one_head": True},
    "peaked": {"peaked": True}, "softcap": {"softcap": 5.0, "peaked": True},
}  # fmt: skip


def run_tiny(names: list[str], shape=TINY, rounds: int = 1) -> list[rows.Row]:
    return running.run(shape, "float32", names, rounds, conditions(), CEILING, lambda n: None, CPU)


def altered(change) -> Provider:
    """The published formula, but for what `change` does to the problem after its backward."""

    def make(problem):
        right = eager.PROVIDER.make(problem)
        return Step(right.forward, lambda loss: (right.backward(loss), change(problem)))

    return replace(eager.PROVIDER, make=make)


# --- the gate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["eager", "linear_ce", "trl", "ours@all", "ours@0"])
def test_gate_lets_the_right_ones_through(name, setting, dtype):
    shape = replace(TINY, **SETTINGS[setting])
    if reason := PROVIDERS[name].unavailable(shape, CPU):
        pytest.skip(reason)
    assert gate.check(PROVIDERS[name], shape, dtype).complaint is None


def test_gate_goes_red_on_planted_wrong_gradients_and_they_are_not_timed(monkeypatch):
    slightly = altered(lambda problem: problem.weight.grad.mul_(1.001))
    verdict = gate.check(slightly, TINY, "float32")
    assert verdict.error == pytest.approx(1e-3, rel=0.01) and "weight" in verdict.complaint
    monkeypatch.setitem(PROVIDERS, "eager", slightly)
    floor, wrong = run_tiny(["floor", "eager"])
    assert floor.seconds is not None and wrong.seconds is None and wrong.red
    assert "RED weight is off" in tabled.markdown(tabled.tables([floor, wrong]))


def test_gate_goes_red_on_a_missing_gradient_and_on_an_exception():
    def forget(problem):
        problem.hidden.grad = None

    def fail(problem):
        raise RuntimeError("planted")

    assert "hidden is off by inf" in gate.check(altered(forget), TINY, "float32").complaint
    assert gate.check(replace(eager.PROVIDER, make=fail), TINY, "float32").complaint == "RuntimeError: planted"


def test_less_than_tdpo_is_held_to_the_truth_of_what_it_computes():
    assert gate.check(replace(linear_ce.PROVIDER, computes="tdpo2"), TINY, "float32").complaint
    assert gate.check(replace(eager.PROVIDER, computes="dpo"), TINY, "float32").complaint


# --- problems ---------------------------------------------------------------------------------------------------------


def test_settings_do_what_they_say():
    base = replace(TINY, T=64, D=64)
    prompts, peaked = (
        make_problem(replace(base, valid=0.25), "float32"),
        make_problem(replace(base, peaked=True), "float32"),
    )
    assert (prompts.labels == IGNORE).float().mean() == 0.75 and replace(base, valid=0.25).rows == 16
    assert (prompts.packed(prompts.labels) != IGNORE).all() and len(prompts.packed(prompts.hidden)) == 16
    assert float((peaked.hidden @ peaked.weight.T).detach().std()) == pytest.approx(8, rel=0.2)
    frozen, one = (
        make_problem(replace(base, trainable=False), "float32"),
        make_problem(replace(base, one_head=True), "float32"),
    )
    assert not frozen.weight.requires_grad and set(frozen.gradients()) == {"hidden"}
    assert one.one_head and one.double().one_head and not prompts.one_head


def test_every_model_has_a_cut_for_a_cpu():
    for name, (V, D, cut, softcap) in MODELS.items():
        small, whole = SHAPES[f"{name}/{cut}"], SHAPES[name]
        assert (small.V, small.D, small.softcap) == (V // cut, D // cut, softcap) and small.device == "cpu"
        assert (whole.V, whole.D) == (V, D) and whole.device == "cuda"
    assert {s.T for s in SHAPES.values() if s.family == "rows"} >= {256, 131072}


# --- who can run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["liger", "cce", "fused@0"])
def test_who_cannot_run_says_why_and_is_not_timed(name):
    floor, absent = run_tiny(["floor", name])
    assert floor.seconds and not absent.seconds and not absent.red
    assert absent.note.startswith("skipped: ")
    assert any(reason in absent.note for reason in ("CUDA", "not installed", "no compiler for cpu"))


def test_what_needs_more_memory_than_there_is_is_not_tried(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: eager.needs(TINY) // 2)
    _, row = run_tiny(["floor", "eager"])
    assert row.note.startswith("out of memory: needs about") and not row.red and row.seconds is None


def test_a_step_that_dies_in_its_own_process_is_not_tried_in_ours(monkeypatch):
    python = sys.executable
    monkeypatch.setattr(sys, "executable", "false")
    _, row = run_tiny(["floor", "eager"])
    assert row.red and "exit 1" in row.note and row.seconds is None
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(memory.subprocess, "run", _instead([python, "-c", script], memory.subprocess.run))
    _, row = run_tiny(["floor", "eager"])
    assert not row.red and row.note.startswith("out of memory: exit -9")


def _instead(command_line, run):
    return lambda _, **options: run(command_line, **options)


def test_peak_memory_is_that_of_the_step():
    shape = replace(TINY, T=1024, V=16000)
    found = {name: memory.peak_extra(shape, "float32", name, CPU) for name in ("eager", "ours@0")}
    logits = 4 * shape.T * shape.V
    assert 4 * logits < found["eager"] < 8 * logits and found["ours@0"] < logits


# --- measurement ------------------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_and_shuffled_and_halves_are_apart(monkeypatch):
    clock, order, cleared = [0.0], [], []

    def passes(name: str, seconds: float):
        order.append(name)
        clock[0] += seconds

    steps = {name: Step(lambda n=name: passes(n, 1.0), lambda out, n=name: passes(n, 2.0)) for name in "abc"}
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    samples = measure.times(steps, lambda: cleared.append(1), CPU, 6, 2, lambda: None)
    assert all((s.forward, s.backward, s.both) == (1.0, 2.0, 3.0) for name in "abc" for s in samples[name])
    rounds = ["".join(order[i : i + 12 : 4]) for i in range(0, len(order), 12)]
    assert len(rounds) == 7 and rounds[0] == "abc" and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds[1:])) > 1 and len(cleared) == 7 * 3 * 3


def test_spread_is_median_and_percentiles():
    assert measure.spread(range(11)) == (5, 2, 8) and measure.spread([4.0]) == (4.0, 4.0, 4.0)


def test_energy_is_read_where_it_is_reported(tmp_path):
    assert energies._powercap(tmp_path) is None
    for name, joules in (("intel-rapl:0", 2), ("intel-rapl:1", 3), ("intel-rapl:0:0", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(str(joules * 10**6))
    assert energies._powercap(tmp_path)() == 5.0


# --- roofline ---------------------------------------------------------------------------------------------------------


def test_flops_bytes_and_units_are_counted_by_hand():
    shape = replace(TINY, T=8, V=10, D=4, pairs=2)
    assert roof.gemm_flops(shape) == 2 * 8 * 10 * 4 and roof.flops(shape) == 4 * 640
    assert roof.flops(replace(shape, trainable=False)) == 3 * 640
    assert roof.flops(replace(shape, valid=0.5)) == 4 * 320
    # forward reads two hidden states and two heads, backward one of each; both gradients are written
    assert roof.bytes_moved(shape, "float32") == 4 * (2 * 32 + 2 * 40 + 32 + 40 + 32 + 40)
    assert roof.bytes_moved(replace(shape, trainable=False, one_head=True), "bfloat16") == 2 * (64 + 40 + 72 + 32)
    assert roof.seconds(shape, "float32", Ceiling(2560.0, 1e9)) == 1.0
    assert roof.seconds(shape, "float32", Ceiling(1e9, 576.0)) == 2.0


def test_a_row_says_its_time_in_products_and_as_percentage_of_the_floor():
    row = made_up(seconds=(0.5, 0.5, 0.5), ratio=(1.25, 1.2, 1.3), ceiling=(2.0 * 32 * 500 * 32 * 10, 1e9))
    assert tabled.in_gemms(row) == 5.0
    shown = tabled.markdown(tabled.tables([row]))
    assert "| 80 %" in shown and "| 5.0 " in shown and "| 1.25 (1.20-1.30)" in shown


def test_ceilings_are_measured(monkeypatch):
    monkeypatch.setattr(roof, "GEMM", {"cpu": (64, 64, 64)})
    monkeypatch.setattr(roof, "COPY", {"cpu": 2**20})
    ceiling = roof.measure("float32", CPU)
    assert 1e6 < ceiling.flops < 1e14 and 1e6 < ceiling.bytes < 1e13


# --- rows -------------------------------------------------------------------------------------------------------------


def made_up(**facts) -> rows.Row:
    facts = {"provider": "ours", "budget_bytes": 0, "shape": "tiny", "conditions": conditions()} | facts
    return rows.Row(T=32, V=500, D=32, dtype="float32", rounds=3, **facts)


def test_rows_come_back_as_they_went(tmp_path):
    out = tmp_path / "rows.jsonl"
    row = made_up(seconds=(1.0, 0.5, 2.0), ceiling=(1.0, 2.0), joules=(3.0, 3.0, 3.0), note="x", drift=0.5)
    rows.append(out, [row])
    rows.append(out, [row])
    assert rows.load(out) == [row, row]
    assert row.conditions.fingerprint and row.conditions.commit and row.conditions.memory_bytes


def test_committed_rows_are_readable():
    old = [row for path in rows.FOLDER.glob("*.jsonl") for row in rows.load(path)]
    assert old and all(row.conditions.commit and not row.red for row in old)


def test_only_what_was_measured_together_is_shown_together():
    early, late = (replace(conditions(), date=f"2026-11-2{day}T00:00:00Z") for day in (1, 2))
    first = [made_up(conditions=early, budget_bytes=b) for b in (0, 1)]
    again, other = made_up(conditions=late, budget_bytes=1), made_up(conditions=early, shape="small")
    assert rows.together([*first, other, again]) == [again, other]


def test_the_table_says_who_does_less_and_who_was_disturbed():
    shown = tabled.markdown(tabled.tables([made_up(partial=True, busy_cores=1.5, peak_extra_bytes=2 * 10**9)]))
    assert "ours@0 *" in shown and "no KL" in shown and "kept 1.5 cores busy" in shown and "2.00 GB" in shown
    assert conditions().torch in shown and conditions().commit in shown


@pytest.fixture
def swift(monkeypatch: pytest.MonkeyPatch) -> None:
    """No processes for memory, no large products for ceilings: both have tests of their own."""
    monkeypatch.setattr(memory, "peak_extra", lambda *_: 10**6)
    monkeypatch.setattr(step, "peak_of", lambda *_: 10**6)
    monkeypatch.setattr(roof, "measure", lambda *_: CEILING)


# --- the command ------------------------------------------------------------------------------------------------------

QUICK = ["--quick", "--parts", "speed", "--dtypes", "float32", "--rounds", "2"]


def test_quick_measures_saves_and_resumes(swift, tmp_path, capsys, monkeypatch):
    out, places = tmp_path / "rows.jsonl", iter([False, False, True])
    real, where = running.run, replace(conditions(), dirty=False)
    done = []
    monkeypatch.setattr(command, "run", lambda *a: done.append(a[0].name) or real(*a))
    monkeypatch.setattr(command, "conditions", lambda device: replace(where, commit="b" if next(places) else "a"))
    for _ in range(3):
        assert command.main([*QUICK, "--resume", "--providers", "eager,ours", "--out", str(out)]) == 0
    assert done == ["tiny", "tiny"]  # the second time there was nothing left; another commit is measured anew
    found = rows.load(out)
    assert [r.provider for r in found[:4]] == ["floor", "eager", "ours", "ours"] and len(found) == 8
    assert all(r.seconds and r.forward and r.backward and r.ceiling and not r.red for r in found)
    assert "eager" in capsys.readouterr().out


def test_a_changed_checkout_is_measured_again(tmp_path):
    where = replace(conditions(), dirty=False)
    job = command.Job("x", 1, (made_up().key,), lambda where, tick: [])
    rows.append(tmp_path / "rows.jsonl", [made_up(conditions=where)])
    assert command._left([job], tmp_path / "rows.jsonl", where) == []
    for elsewhere in (replace(where, dirty=True), replace(where, commit="c"), replace(where, fingerprint="f")):
        assert command._left([job], tmp_path / "rows.jsonl", elsewhere) == [job]


def test_no_save_saves_nothing(swift, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert command.main([*QUICK, "--no-save", "--providers", "eager", "--out", str(out)]) == 0
    assert not out.exists()


def test_keys_of_a_plan_are_those_of_its_rows(swift):
    """Or `--resume` would never find anything done."""
    options = command.parser().parse_args(
        ["--quick", "--rounds", "1", "--dtypes", "float32", "--providers", "eager,liger"]
    )
    for job in command._plan(options, CPU):
        assert {row.key for row in job.run(conditions(), lambda n: None)} == set(job.keys), job.name


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--shapes", "nope"], "--shapes: unknown nope, wanted some of anchor"),
        (["--providers", "nope"], "--providers: unknown nope"),
        (["--parts", "nope"], "--parts: unknown nope, wanted some of accuracy"),
        (["--rounds", "0"], "--rounds: got 0"),
        (["--device", "tpu"], "--device: got 'tpu'"),
        (["--shapes", "cpu-152k", "--providers", "eager"], "nothing to measure"),
    ],
)
def test_unknown_names_are_named(arguments, wanted, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    assert exit.value.code == 2
    assert wanted in capsys.readouterr().err


# --- accuracy and whole steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", [1e-8, 1e-2, 10.0])
def test_the_drift_is_what_it_is_said_to_be(target, dtype):
    assert drift._mean_kl(drift.drifted(target, dtype)) == pytest.approx(target, rel=0.05)


def test_drift_tells_errors_apart(monkeypatch):
    off = replace(eager.PROVIDER, kl=lambda problem: 1.01 * eager.kl(problem))
    monkeypatch.setitem(PROVIDERS, "compiled", off)
    monkeypatch.setitem(PROVIDERS, "trl", replace(off, unavailable=lambda shape, device: "planted"))
    found = drift.study(
        "float32", ["eager", "ours@0", "compiled", "trl"], (1e-8, 1.0), conditions(), lambda n: None, CPU
    )
    by = {(row.shape, row.provider): row for row in found}
    assert by["drift", "trl"].note == "skipped: planted" and len(found) == 7
    assert by["drift-1e-08", "eager"].kl_error > 0.1 > 1e-3 > by["drift-1e-08", "ours"].kl_error
    assert by["drift-1e+00", "compiled"].kl_error == pytest.approx(0.01, rel=1e-3)
    assert by["drift-1e+00", "compiled"].error == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("fixed", "slope"), [(0, 10**6), (10**8, 3 * 10**5), (3 * 10**8, 2 * 10**6)])
def test_the_longest_context_is_long_and_was_measured_to_fit(fixed, slope):
    asked, limit = {}, 10**9
    length, held = step.search(lambda n: asked.setdefault(n, fixed + slope * n), 128, limit)
    assert asked[length] == held <= limit and held > 0.9 * limit and len(asked) <= step.TRIES


def test_no_context_is_made_up_where_none_fits():
    assert step.search(lambda n: 2 * 10**9, 128, 10**9) is None


def test_a_step_trains_and_everybody_s_is_the_same():
    pytest.importorskip("transformers")
    after = {}
    for name in ("eager", "ours@0"):
        loop = step.Loop(step.SIZES["smallest"], CPU)
        before = loop.policy.lm_head.weight.detach().clone()
        one = loop.step(name, 16)
        one.backward(one.forward())
        after[name] = loop.policy.lm_head.weight.detach()
        assert not torch.equal(after[name], before)
    assert torch.allclose(after["eager"], after["ours@0"], atol=1e-6)


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured() -> list[rows.Row]:
    where = conditions()
    growing = [
        rows.Row(
            f"rows-{T}",
            T,
            8016,
            256,
            "float32",
            name,
            budget,
            3,
            where,
            (T / 1e4,) * 3,
            (1.5, 1.4, 1.6),
            T * 1000,
            1e-7,
        )
        for T in (256, 1024)
        for name, budget in (("eager", None), ("ours", 0))
    ]
    wall = rows.Row(
        "rows-131072", 131072, 8016, 256, "float32", "eager", None, 1, where, note="out of memory: needs 25 GB"
    )
    return [*growing, wall, made_up(shape="drift-1e-02", drift=0.0123, kl_error=4.5e-6, error=6.7e-5)]


def test_the_report_stands_alone_and_says_what_was_not_measured(measured, tmp_path):
    pytest.importorskip("matplotlib")
    out, to = tmp_path / "cpu.jsonl", tmp_path / "report"
    rows.append(out, measured)
    assert command.main(["report", "--out", str(out), "--to", str(to)]) == 0
    text, page = (to / "report.md").read_text(), (to / "report.html").read_text()
    names = {path.name for path in to.glob("*.png")}
    figures = ("cpu-rows", "cpu-errors", "cpu-drift", "scaling")
    assert names == {f"{name}-{theme}.png" for name in figures for theme in ("light", "dark")}
    assert "Estimated" in text.split("scaling-light.png")[1].split("\n")[2]
    assert all(name in text for name in names) and page.count("data:image/png;base64,") == len(names)
    assert "://" not in page and 'src="cpu' not in page and "prefers-color-scheme: dark" in page
    for shown in (text, page):
        assert "Not yet measured on a GPU." in shown and "out of memory: needs 25 GB" in shown
        assert all(number in shown for number in ("4.5e-06", "6.7e-05", "1.50 (1.40-1.60)", "102.40"))


def test_where_a_gpu_has_measured_the_report_does_not_say_otherwise(tmp_path):
    pytest.importorskip("matplotlib")
    from bench.report.build import write

    write({"cpu": [], "nvidia-h200": [made_up(provider="gemm", budget_bytes=None, ratio=(1.0, 1.0, 1.0))]}, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Not yet measured" not in text and "time / one product" in text and "of floor" not in text


def test_colours_of_light_and_dark_differ(measured, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    from bench.report import figures

    (drawn,) = figures.draw([row for row in measured if row.drift], tmp_path, "cpu")
    light, dark = imread(drawn.light), imread(drawn.dark)
    assert light[2, 2, :3].mean() > 0.9 and dark[2, 2, :3].mean() < 0.2


def test_every_provider_has_a_colour():
    pytest.importorskip("matplotlib")
    from bench.report.figures import COLOURS

    assert {name.split("@")[0] for s in SHAPES.values() for name in s.contenders} <= set(COLOURS)
