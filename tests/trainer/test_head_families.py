"""The committed table of families: a core of it is tried again here, the whole of it where `-m long` asks for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs"))
import families  # noqa: E402

TABLE = (ROOT / "docs" / "families.md").read_text()
VERSION = f"with transformers {transformers.__version__}."
CORE = [
    "bart", "bert", "bloom", "cohere2", "falcon_h1", "falcon_mamba", "gemma", "gemma2", "gemma3_text", "gpt2",
    "gpt_neox", "gptj", "granite", "hyperclovax", "inkling_text", "llama", "llama4_text", "minicpm3", "mixtral",
    "modernbert-decoder", "mpt", "opt", "phi", "prophetnet", "qwen2", "qwen3", "qwen3_moe", "recurrent_gemma", "xlstm",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _same_version() -> None:
    if VERSION not in TABLE:
        pytest.skip(f"docs/families.md is not of transformers {transformers.__version__}: make families")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", CORE)
def test_a_family_is_what_the_table_says(family: str):
    assert families.line(families.try_family(family)) in TABLE.split("## ")[1]


def test_every_family_is_in_the_table():
    names = {line.split(" | ")[0].strip("| ") for line in TABLE.splitlines() if line.startswith("| ")}
    assert set(families.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= names
    assert set(families.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) <= names


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_whole_table(capsys: pytest.CaptureFixture[str]):
    families.main([])
    assert capsys.readouterr().out == TABLE
