"""The language models of the demo: a small one built on the spot or a local one loaded, fine-tuning, and sampling."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from pairs import Batch, Ids, UsageError
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SPECIAL = ("<pad>", "</s>", "<unk>")
LARGEST_VOCABULARY = 8192


def small_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark, the most frequent ones of `texts`."""
    split = pre_tokenizers.Whitespace()
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(text))
    words = sorted(counts, key=lambda word: (-counts[word], word))[: LARGEST_VOCABULARY - len(SPECIAL)]
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def small_model(
    tokenizer: PreTrainedTokenizerFast, max_length: int, width: int = 96, layers: int = 2
) -> LlamaForCausalLM:
    """The Llama architecture at a size that two CPU cores train in half a minute, with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=max_length, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None, initializer_range=0.05,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def load(directory: Path):
    """Model and tokenizer of a local directory, in fp32. Nothing is fetched and no code of the directory is run."""
    if not (directory / "config.json").is_file():
        raise UsageError(f"--model {directory}: not a directory of a Hugging Face model, there is no config.json in it")
    options = dict(local_files_only=True, trust_remote_code=False)
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
    except Exception as error:  # a broken directory fails in as many ways as there are files in it
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(f"--model {directory}: does not load as a causal LM with its tokenizer: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise UsageError(f"--model {directory}: its tokenizer has no EOS token to end a completion with")
    return model, tokenizer


def pad_id(tokenizer) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def rate(step: int, steps: int) -> float:
    """Return a factor of the learning rate: up linearly for a tenth of the steps, then down along a cosine."""
    rising = max(steps // 10, 1)
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising + 1) / (steps - rising + 1))) / 2


def fine_tune(model: nn.Module, batches: Iterable[Batch], steps: int, lr: float) -> Iterator[float]:
    """Supervised fine-tuning on the labels of `batches`, at a rate that falls to zero. Yields the loss of each step."""
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    for batch in batches:
        loss = model(**vars(batch), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield float(loss.detach())


@torch.no_grad()
def sample(model: nn.Module, tokenizer, prompts: Sequence[Ids], max_new_tokens: int) -> list[Ids]:
    """One completion per prompt from the model's own distribution, up to and with its EOS.

    Prompts are padded on the left, so that every completion follows its prompt directly.
    """
    model.eval()
    pad, eos, length = pad_id(tokenizer), tokenizer.eos_token_id, max(map(len, prompts))
    input_ids = torch.tensor([(pad,) * (length - len(ids)) + ids for ids in prompts], device=model.device)
    mask = torch.tensor([(0,) * (length - len(ids)) + (1,) * len(ids) for ids in prompts], device=model.device)
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
        max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=eos,
    )  # fmt: skip
    out = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)
    rows = out[:, length:].tolist()
    return [tuple(row[: row.index(eos) + 1] if eos in row else row) for row in rows]
