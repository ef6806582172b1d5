"""Law 4: beyond inputs, outputs and gradients: the budget, one workspace, a 16-bit gradient's accumulator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import batches
import pytest
import torch
from batches import EXTRAS
from runnable import grid
from seeing import Ledger
from torch import Tensor

import tdpo_kernels
from tdpo_kernels import LMHead, fused_tdpo_loss, token_stats

NOTHING = slice(0)  # of the labels
MIB = 2**20
WORKSPACE = 64 * MIB  # a CPU's, DESIGN section 4
BUDGET = 24 * MIB
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def batch(T: int, V: int, D: int, dtype: torch.dtype = torch.float32, E: int | None = None, ignored: slice = NOTHING):
    call = batches.batch(dtype, 2, T // 2, D, V, E=E)
    for x in (call[n].detach() for n in ("hidden", "head", "ref_hidden", "ref_head")):
        x.mul_(x.shape[-1] ** -0.25)  # logits of about 1: none saturates, and backward has something to do
    call["labels"][:, ignored] = -100
    return call


def bounds(call: dict) -> tuple[int, int, int]:
    """Return the bytes of all that may be kept, of a 16-bit gradient's fp32 sum, and of what belongs to the caller.

    Kept are both models' logits, 8 bytes an entry (16 in float64), and row values. The caller's are the gradients, and
    a frozen head's directions, as large as dh.
    """
    head, hidden, T = call["head"], call["hidden"], call["labels"].numel()
    weight, bias = (head.weight, head.bias) if isinstance(head, LMHead) else (head, None)
    V, D = weight.shape
    kept = T * V * (16 if hidden.dtype == torch.float64 else 8) + MIB
    summed = 4 * D * min(T, V) if min(hidden.itemsize, weight.itemsize) == 2 and weight.requires_grad else 0
    own = sum(x.nbytes for x in (hidden, weight, bias) if x is not None and x.requires_grad)
    return kept, summed, own + (0 if weight.requires_grad else hidden.nbytes)


def law_4(call: dict, budget: int, workspace: int = WORKSPACE, **options) -> Ledger:
    """Return what one forward and backward makes, which is within the law."""
    with Ledger() as book:
        fused_tdpo_loss(**call, memory_budget=budget, **options).loss.backward()
    kept, summed, own = bounds(call)
    assert book.peak <= min(budget, kept) + workspace + summed + own
    assert book.largest <= max(min(budget, kept), workspace, own)
    return book


@pytest.mark.parametrize("T, V", [(2048, 2048), (64, 65536), (4096, 1024), (128, 16384), (2048, 16384)])
def test_budget_zero_never_allocates_it_for_any_shape(T: int, V: int):
    """Nor more as T grows 16 x."""
    assert law_4(batch(T, V, 8), 0).most_elements < T * V


@pytest.mark.parametrize("budget", [0, 2**40])
@pytest.mark.parametrize("T, V, D", [(1000, 1000, 16), (64, 1000, 1000), (32, 1024, 24000)])
def test_a_small_call_takes_no_more_than_the_workspace_and_what_it_keeps(T: int, V: int, D: int, budget: int):
    """The first two are one tile, the last has much of a head."""
    law_4(batch(T, V, D), budget)


BUDGETS = [(0, {"variant": "tdpo1"}), (0, {}), (0, {"alpha": 0.0}), (BUDGET // 8, {"variant": "tdpo1"}), (BUDGET, {})]


@pytest.mark.parametrize("budget, options", [*BUDGETS, (2**40, {})], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tensor_is_larger_than_the_budget_and_the_workspace(dtype: torch.dtype, budget: int, options: dict):
    book = law_4(batch(1024, 8192, 16, dtype), budget, **options)
    assert budget or 0 < book.most_elements < 1024 * 8192 / 2


def test_a_budget_is_used():
    """Otherwise the bounds above would hold for nothing."""
    assert law_4(batch(1024, 8192, 16), BUDGET).largest > 0.6 * BUDGET  # whole tiles of 8 MiB
    assert law_4(batch(1024, 8192, 16), 0).largest < 0.4 * BUDGET
    assert law_4(batch(1024, 8192, 16, torch.bfloat16), 2**40).largest >= 8 * 1024 * 8192


def test_without_a_gradient_the_budget_is_not_touched():
    call = {n: x.detach() if isinstance(x, Tensor) else x for n, x in batch(1024, 8192, 16).items()}
    with Ledger() as book:
        token_stats(**call, memory_budget=2**40, extras=EXTRAS)
    assert book.peak <= WORKSPACE < bounds(call)[0]


def test_no_float32_copy_of_a_whole_matrix():
    """bf16 heads and hidden states are widened a block at a time."""
    call = batch(64, 32768, 512, torch.bfloat16)
    call["head"].requires_grad_(False)
    assert law_4(call, 0).largest < 32768 * 512 * 2


@pytest.fixture
def little_room(small_tiles, monkeypatch: pytest.MonkeyPatch) -> int:
    """A workspace of 4 MiB: less than any copy of hidden states."""
    small_tiles(256, 512)
    monkeypatch.setitem(grid.WORKSPACE, "cpu", 4 * MIB)
    return 4 * MIB


def test_ignored_rows_are_not_gathered_all_at_once(little_room: int):
    call = batch(4096, 64, 512, ignored=slice(None, None, 2))
    call["head"].requires_grad_(False)
    law_4(call, 0, little_room)


@pytest.mark.parametrize("wanted", ["hidden", "head"])
def test_a_frozen_part_s_gradient_is_never_made(wanted: str):
    call = batch(512, 512, 1024, torch.bfloat16)
    for name in ("hidden", "head"):
        call[name].requires_grad_(name == wanted)
    law_4(call, 0, WORKSPACE // 2)


WIDE = {str(dtype): dict(dtype=dtype) for dtype in (*DTYPES, torch.float64)}
WIDE["bf16, wider reference"] = dict(dtype=torch.bfloat16, E=6144)


@pytest.mark.parametrize("ignored", [NOTHING, slice(200, None)], ids=["all rows", "half the rows"])
@pytest.mark.parametrize("options", WIDE.values(), ids=WIDE)
def test_workspace_holds_at_hidden_size_4096(options: dict, ignored: slice):
    call = batch(512, 640, 4096, **options, ignored=ignored)
    law_4(call, 0)
    assert all(call[n].grad.ne(0).any() for n in ("hidden", "head")), "a saturated loss walks no tile in backward"


@pytest.mark.parametrize("ignored", [NOTHING, slice(None, None, 100)], ids=["all rows", "packed rows"])
def test_workspace_holds_under_autocast_at_hidden_size_4096(ignored: slice):
    with torch.autocast("cpu", torch.bfloat16):
        law_4(batch(1024, 1024, 4096, ignored=ignored), 0)


@pytest.mark.parametrize("budget", [0, 2**40])
def test_softcap_and_bias_stay_within_the_workspace(budget: int):
    call = batch(1024, 4096, 16)
    law_4(call | {"head": LMHead(call["head"], torch.zeros(4096, requires_grad=True), 0.5, 30.0)}, budget)


def test_memory_is_given_back_after_backward():
    call = batch(512, 2048, 16)
    with Ledger() as book:
        out = fused_tdpo_loss(**call, memory_budget=2**40)
        out.loss.backward()
    left = sum(size for ref, size in book.alive.values() if not ref.expired())
    assert left <= bounds(call)[2] + MIB


CUTS = {
    "hidden[:, :-1]": lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1].detach(),
    "length first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1).detach(),
    "as it was": lambda x: x.detach(),
}
LAID = [("hidden[:, :-1]", "hidden[:, :-1]"), ("length first", "length first"), ("hidden[:, :-1]", "as it was")]
LAID += [("as it was", "length first"), ("hidden[:, :-1]", "length first")]


@pytest.mark.parametrize("hidden, ref_hidden", LAID)
@pytest.mark.parametrize("ignored", [False, True], ids=["all rows", "half the rows"])
def test_hidden_states_are_not_copied_to_make_them_a_matrix(hidden: str, ref_hidden: str, ignored: bool, little_room):
    """Nor where the two lie differently: rows are gathered as many at a time as the workspace holds."""
    whole = batch(4096, 64, 512, E=768, ignored=slice(None, None, 2) if ignored else NOTHING)
    whole["head"].requires_grad_(False)
    call = whole | {"hidden": CUTS[hidden](whole["hidden"]), "ref_hidden": CUTS[ref_hidden](whole["ref_hidden"])}
    call["hidden"].requires_grad_()
    (want,) = torch.autograd.grad(fused_tdpo_loss(**whole, memory_budget=0).loss, whole["hidden"])
    with Ledger() as book:
        (found,) = torch.autograd.grad(fused_tdpo_loss(**call, memory_budget=0).loss, call["hidden"])
    assert book.peak <= bounds(call)[2] + little_room
    assert torch.equal(found, want)


# --- resident memory of a fresh process -------------------------------------------------------------------------------

CHILD = """
import sys, torch
from tdpo_kernels import fused_tdpo_loss
T, V, D = 2048, 32000, 128

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key + ":"))

def peak(T, V, D, budget):
    randn = lambda *shape: torch.randn(*shape) * D**-0.25
    hidden, head = randn(2, T // 2, D).requires_grad_(), randn(V, D).requires_grad_()
    call = hidden, head, randn(2, T // 2, D), randn(V, D), torch.randint(0, V, (2, T // 2))
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    fused_tdpo_loss(*call, shift=False, memory_budget=budget).loss.backward()
    return status("VmHWM") - before

peak(8, 64, 8, 0)
print(*(peak(T, V, D, int(budget)) - 4 * (T + V) * D for budget in sys.argv[1:]))
"""


def can_reset_the_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return "VmHWM" in Path("/proc/self/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not can_reset_the_peak(), reason="needs /proc/self/clear_refs and VmHWM")
def test_resident_memory_where_logits_are_what_matters():
    """Above inputs and gradients, with nothing kept and with 300 MB: one [T, V] would be 262 MB, and there are two."""
    give_back_at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(Path(tdpo_kernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    child = [sys.executable, "-c", CHILD, "0", str(300 * 10**6)]
    env = os.environ | give_back_at_once | {"PYTHONPATH": path}
    done = subprocess.run(child, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    none, some = map(int, done.stdout.split())
    assert none <= 100 * 10**6 and some <= 400 * 10**6
