"""Tiny random vision-language models, written to disk the way a hub repository lays them out.

No model can be downloaded in tests, so every family is built from its config: random weights, a tokenizer
trained here, and the family's own processor. The directories load through the plain Auto classes. `FAMILIES` are those
that most tests run; the others are narrower, of five blocks.

A new family is an entry in the MAKERS of one of the files here, or of a file of its own that is listed below.
"""

import json
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    BatchFeature,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from tiny import llava, others, qwen
from tiny.parts import BLOCKS, HIDDEN, IMAGE_SIZE, LAYERS, LLAVA_TEMPLATE, PATCH, WORDS, Maker, make_tokenizer

__all__ = [
    "BLOCKS", "HIDDEN", "IMAGE_SIZE", "LAYERS", "LLAVA_TEMPLATE", "MAKERS", "PATCH", "build", "conversations", "encode",
    "make_tokenizer", "prompts", "random_image",
]  # fmt: skip

MAKERS: dict[str, Maker] = {}
for _group in (llava, qwen, others):
    MAKERS |= _group.MAKERS
FAMILIES: tuple[str, ...] = ("llava", "llava_next", "qwen2_5_vl", "smolvlm", "gemma3", "idefics3")
SAFETY, SEMANTIC = 2, 3  # layers of these
RECURRENT = ("qwen3_5", "qwen3_5_moe", "lfm2_vl", "minicpmv4_6", "minicpmv4_7", "lfm3_vl")
# Of a version of transformers in which the stock model fails at each call.
BROKEN = {("llama4", "5.24.0"): "its forward reads image_outputs, which its text model's output has not"}
GIVEN_CACHE = ("granite4_vision",)  # whose decoder makes no cache where it is given none

# Weight matrices are drawn this wide so that attention, MLP and head all matter: with the usual 0.02 a tiny
# model answers every prompt alike, and a wrong second lane would go unseen.
INIT_STD = 0.2
# Smaller than the rest, or a model with scaled and tied embeddings (Gemma) merely repeats its last token.
EMBEDDING_STD = 0.1
NORM_STD = 0.1
BIAS_STD = 0.05


def build(family: str, directory: Path, *, seed: int = 0, shards: int = 1, **overrides: Any) -> Path:
    """Write a tiny random model of `family` into `directory` and return that directory.

    `overrides` are fields of the text config (`final_logit_softcapping=30.0`, `num_hidden_layers=4`, ...);
    `tie_word_embeddings` is set on the whole config too. `shards > 1` splits the weights under an index, into
    about that many files.
    """
    config, processor = MAKERS[family](overrides)
    with torch.random.fork_rng():
        # Initial values that are drawn at random, such as CLIP's class embedding, stay part of the weights.
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    _randomise(model, seed)
    model.generation_config = _generation_config(config)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    model.save_pretrained(directory, max_shard_size=size // shards + 1 if shards > 1 else "5GB")
    processor.save_pretrained(directory)
    # Hub repositories carry this file; transformers 5 no longer writes it: processor_config.json has it all.
    described = {**processor.image_processor.to_dict(), "processor_class": type(processor).__name__}
    (directory / "preprocessor_config.json").write_text(json.dumps(described, indent=2, default=list) + "\n")
    return directory


def prompts(
    processor: ProcessorMixin, *, images: bool, count: int, seed: int, padding_side: Literal["left", "right"]
) -> BatchFeature:
    """A batch of `count` random prompts of different lengths, through the chat template.

    With `images`, every row but each third one carries one random image of its own size: all six families
    take mixed batches. A batch of fewer than three rows has an image in every row.
    """
    return encode(processor, conversations(images=images, count=count, seed=seed), padding_side=padding_side)


def encode(
    processor: ProcessorMixin,
    chats: list[list[dict[str, Any]]],
    *,
    padding_side: Literal["left", "right"] = "left",
    add_generation_prompt: bool = True,
) -> BatchFeature:
    """The model inputs of a batch of chats, padded together."""
    inputs = processor.apply_chat_template(
        chats,
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding": True, "padding_side": padding_side, "return_tensors": "pt"},
    )
    assert isinstance(inputs, BatchFeature)
    return inputs


def conversations(*, images: bool, count: int, seed: int) -> list[list[dict[str, Any]]]:
    """The chats behind `prompts`, one per row: single user turns of the processors' content-list form."""
    draw = random.Random(seed)
    # Lengths differ by row, and no two rows of a small batch are as long: padding must matter.
    lengths = [3 + 2 * (step % 16) for step in draw.sample(range(count + 2), count)]
    chats = []
    for row, length in enumerate(lengths):
        content: list[dict[str, Any]] = []
        if images and row % 3 != 2:
            content.append({"type": "image", "image": random_image(draw.randrange(2**31))})
        content.append({"type": "text", "text": " ".join(draw.choices(WORDS, k=length))})
        chats.append([{"role": "user", "content": content}])
    return chats


def random_image(seed: int) -> Image.Image:
    """A random RGB image of 24 to 64 pixels a side."""
    draw = np.random.default_rng(seed)
    height, width = draw.integers(24, 65, size=2)
    # Large flat cells keep images apart after any resizing; white noise would average out to one grey.
    cells = draw.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((int(width), int(height)), Image.Resampling.NEAREST)


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter anew: matrices wide, norms and biases around their initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)  # same shape as the parameter
            if parameter.ndim > 1:
                parameter.copy_(noise * (EMBEDDING_STD if "embed_tokens" in name else INIT_STD))
            else:
                parameter.add_(noise * (BIAS_STD if name.endswith("bias") else NORM_STD))
        # A trained model never says the placeholder of an image. A random one would, and a pass over its own
        # answer would then look for one image more. A logit of 0 is never the largest of hundreds.
        for name in ("image_token_id", "video_token_id"):
            if hasattr(model.config, name):
                model.get_output_embeddings().weight[getattr(model.config, name)] = 0.0  # (hidden,)


def _generation_config(config: PreTrainedConfig) -> GenerationConfig:
    """Greedy decoding with the special tokens of the text config, as hub repositories ship it."""
    text = config.get_text_config()
    return GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id, do_sample=False
    )
