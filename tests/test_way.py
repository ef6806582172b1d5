"""What `env` and trainers say of a call before it is made is what the call then does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from batches import batch
from seeing import Products

from tdpo_kernels import directions, fused_tdpo_loss
from tdpo_kernels.__main__ import main
from tdpo_kernels.ways import way

V, D, PAIRS, LENGTH = 96, 16, 3, 10
TOKENS, ROW = 2 * PAIRS * LENGTH, 2 * V * 4
BUDGETS = {"nothing": 0, "half": TOKENS * ROW // 2, "a pair": 2 * LENGTH * ROW, "less than a pair": 15 * ROW,
           "everything": 2**40}  # fmt: skip


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_a_call_makes_as_many_products_as_it_is_said_to(budget: int, trained: bool):
    """Chosen and rejected rows of one tile make both models' logits again, so half a product more may be made."""
    said = way(TOKENS, PAIRS, V, D, torch.float32, trained=trained, memory_budget=budget)
    call = batch(torch.float32, rows=2 * PAIRS, length=LENGTH, D=D, V=V)
    call["head"] = call["head"].detach().requires_grad_(trained)
    with Products() as products:
        fused_tdpo_loss(**call, memory_budget=budget).loss.backward()
    made = products.flops / (2 * TOKENS * V * D)
    again = said.products - (4 if trained else 3)
    assert said.products <= made + 1e-9 and made <= said.products + again / 3 + 0.26 * (again > 0)


def test_the_table_of_budgets_is_where_a_call_makes_no_logits_twice():
    rows = re.findall(r"^\| ([\d,]+) \| ([\d.]+) GB \| ([\d.]+) GB \|$", Path("docs/budget.md").read_text(), re.M)
    assert len(rows) == 4
    for vocab, *sizes in rows:
        for trained, size in zip((False, True), sizes, strict=True):
            for share, enough in ((1.01, True), (0.98, False)):
                call = dict(trained=trained, memory_budget=int(float(size) * share * 1e9), device="cuda")
                found = way(8 * 1024, 8, int(vocab.replace(",", "")), 4096, torch.bfloat16, **call)
                assert (found.products == 3 + trained) == enough, (vocab, trained, share, str(found))


def test_env_says_the_way_of_a_size(capsys: pytest.CaptureFixture):
    least = directions.LEAST["cuda" if torch.cuda.is_available() else "cpu"]
    main(["env", "--tokens", "9000", "--pairs", "2", "--vocab", "1600", "--dtype", "fp32", "--memory-budget", "1"])
    said = capsys.readouterr().out
    assert "9,000 tokens in 2 pairs, V = 1,600, D = 4,096, fp32, memory_budget 1" in said
    assert f"frozen   dh is made in forward, {least:,} tokens at a time: 4.5 products" in said
    with pytest.raises(SystemExit):
        main(["env", "--pairs", "0"])
