"""Idefics and SmolVLM."""

from functools import partial
from typing import Any

import transformers as hf

from tiny.parts import (
    IDEFICS_TEMPLATE,
    IMAGE_SIZE,
    PATCH,
    SMALL_VISION,
    VISION,
    Made,
    Maker,
    make_tokenizer,
    small_text,
    text_fields,
)


def _idefics(overrides: dict[str, Any], *, name: str, tied: bool) -> Made:
    """Idefics3: Llama text under `text_model`, SigLIP-like vision, tiled images.

    SmolVLM2 differs in its classes and in its tied embeddings.
    """
    tiles = " ".join(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    tokenizer = make_tokenizer(
        "<|endoftext|> <|im_start|> <|im_end|> <end_of_utterance> <fake_token_around_image> <image> <global-img> "
        + tiles,
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        template=IDEFICS_TEMPLATE,
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )
    tied = overrides.get("tie_word_embeddings", tied)
    config = getattr(hf, f"{name}Config")(
        text_config=hf.LlamaConfig(**text_fields(tokenizer, overrides) | {"tie_word_embeddings": tied}),
        vision_config=VISION,
        scale_factor=2,
        image_token_id=tokenizer.get_vocab()["<image>"],
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=tied,
    )
    # The long side grows to two tiles, each of the vision tower's size.
    images = getattr(hf, f"{name}ImageProcessorPil")(
        size={"longest_edge": 2 * IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}
    )
    # SmolVLM's own processor insists on torchvision and num2words, for videos. That of Idefics3 treats images
    # alike, and is the one that SmolVLM 1 names.
    tokens = (IMAGE_SIZE // PATCH) ** 2 // 4  # of one tile
    return config, hf.Idefics3Processor(images, tokenizer, image_seq_len=tokens, chat_template=IDEFICS_TEMPLATE)


def _idefics2(overrides: dict[str, Any]) -> Made:
    """Idefics2: Mistral text, SigLIP-like vision of any ratio, a perceiver that gives each picture a few tokens."""
    tokenizer = make_tokenizer(
        "<|endoftext|> <|im_start|> <|im_end|> <end_of_utterance> <fake_token_around_image> <image>",
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        template=IDEFICS_TEMPLATE,
        image_token="<image>",
        image_boundary_token="<fake_token_around_image>",
    )
    text = hf.MistralConfig(**small_text(tokenizer, overrides, sliding_window=None))
    perceiver = {
        "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
        "resampler_head_dim": 8, "num_key_value_heads": 1,
    }  # fmt: skip
    config = hf.Idefics2Config(
        text_config=text,
        vision_config=SMALL_VISION,
        perceiver_config=perceiver,
        image_token_id=tokenizer.get_vocab()["<image>"],
    )
    images = hf.Idefics2ImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE // 2, "longest_edge": IMAGE_SIZE}, do_image_splitting=False
    )
    return config, hf.Idefics2Processor(images, tokenizer, image_seq_len=4, chat_template=IDEFICS_TEMPLATE)


MAKERS: dict[str, Maker] = {
    "smolvlm": partial(_idefics, name="SmolVLM", tied=True),
    "idefics3": partial(_idefics, name="Idefics3", tied=False),
    "idefics2": _idefics2,
}  # fmt: skip
