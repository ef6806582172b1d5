"""A vision-language model: images reach policy and reference, and the losses are those of TDPO written plainly."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from runs import LETTERS, config, eager_run, losses, parameters, recorded, text_pairs, tokenizer, worst
from tdpo_trainer.trainer import TDPOTrainer
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

IMAGE = "<image>"


def processor() -> LlavaProcessor:
    pytest.importorskip("PIL")
    shape = dict(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    reader = tokenizer()
    reader.add_special_tokens({"additional_special_tokens": [IMAGE]})
    more = dict(patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    return LlavaProcessor(image_processor=kind(**shape), tokenizer=reader, **more)


def llava(seed: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    text = LlamaConfig(vocab_size=4 + len(LETTERS), max_position_embeddings=64, initializer_range=0.3, **sizes)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=3 + len(LETTERS))
    )


def test_losses_and_parameters_are_the_eager_implementation_s(tmp_path: Path):
    from PIL import Image

    rng = np.random.default_rng(0)
    rows = [
        pair | {"prompt": IMAGE + pair["prompt"], "image": Image.fromarray(rng.integers(0, 255, (9, 8, 3), np.uint8))}
        for pair in text_pairs(6)
    ]
    model, reference = llava(0), llava(1)
    args = config(tmp_path, max_steps=2, remove_unused_columns=False)
    ours = TDPOTrainer(
        copy.deepcopy(model), reference, args, processing_class=processor(), train_dataset=Dataset.from_list(rows)
    )
    steps = recorded(ours)
    ours.train()
    assert steps[0][0]["pixel_values"].shape == (4, 3, 8, 8)
    theirs = eager_run(model, steps, reference)
    assert losses(ours) == pytest.approx(theirs, rel=1e-5)
    assert worst(parameters(ours.model), parameters(model)) < 1e-5
