"""Prompts and completions as token ids: what a tokenizer adds is there once, what is written stays."""

from __future__ import annotations

import pytest
from tdpo_trainer.tokens import completion_ids, prompt_ids, tokenize
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["<s>", "</s>", "a", "b"]
BOS, EOS, A, B = range(4)


def tokenizer(adds: str) -> PreTrainedTokenizerFast:
    """Return one that adds a BOS, an EOS, both or neither, as models' do."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    single = f"{'<s> ' if 'b' in adds else ''}$A{' </s>' if 'e' in adds else ''}"
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("adds", ["", "b", "e", "be"])
def test_what_the_tokenizer_adds_is_there_once_and_what_is_written_stays(adds: str):
    by, front = tokenizer(adds), (BOS,) * ("b" in adds)
    assert prompt_ids(by, "a b") == (*front, A, B)
    assert prompt_ids(by, "a</s>") == (*front, A, EOS)
    assert prompt_ids(by, "a</s></s>") == (*front, A, EOS, EOS)
    assert prompt_ids(by, "<s>a") == (BOS, A)  # a template was applied beforehand
    assert completion_ids(by, "b") == completion_ids(by, "b</s>") == (B, EOS)
    assert completion_ids(by, "") == (EOS,)
    (row,) = tokenize(by, [{"prompt": "<s>a</s>", "chosen": "a", "rejected": "b</s>"}])
    assert row == {"prompt_ids": [BOS, A, EOS], "chosen_ids": [A, EOS], "rejected_ids": [B, EOS]}


def test_a_prompt_of_no_token_is_refused():
    with pytest.raises(ValueError, match="prompt: the tokenizer makes no token of ''"):
        prompt_ids(tokenizer("e"), "")
