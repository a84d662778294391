"""Processors of families whose own wants torchvision, as far as pictures go: the tokens and numbers are the same.

vLLM loads the family's own from what these write, so that the tests compare the two.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as hf
from transformers import AutoProcessor, AutoTokenizer


class Rows(hf.LightOnOcrProcessor):
    """PixtralProcessor: a mark behind each row of a picture's tokens, and another behind the last."""

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        height, width = (int(size) // self.effective_patch_size for size in image_inputs["image_sizes"][image_idx])
        rows = ["[IMG]" * width] * height
        return "[IMG_BREAK]".join(rows) + "[IMG_END]"


class Framed(hf.LlavaProcessor):
    """InternVLProcessor: a picture's tiles as so many tokens each, between two marks."""

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return "<img>" + "<image>" * 4 * int(image_inputs["num_patches"][image_idx]) + "</img>"

    @property
    def unused_input_names(self) -> list[str]:
        return ["num_patches"]


AutoProcessor.register(hf.Mistral3Config, Rows, exist_ok=True)
AutoProcessor.register(hf.InternVLConfig, Framed, exist_ok=True)


def rows(directory: Path) -> None:
    old = AutoProcessor.from_pretrained(directory)
    Rows(
        old.image_processor, old.tokenizer, patch_size=old.patch_size, spatial_merge_size=old.spatial_merge_size,
        chat_template=old.chat_template,
    ).save_pretrained(directory)  # fmt: skip


def framed(directory: Path) -> None:
    named = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<image>",
        "video_token": "<pad>",
    }  # fmt: skip
    old = AutoProcessor.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory, extra_special_tokens=named)
    images = hf.GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4)
    Framed(images, tokenizer, patch_size=16, chat_template=old.chat_template).save_pretrained(directory)
    described = images.to_dict() | {"processor_class": "InternVLProcessor"}
    (directory / "preprocessor_config.json").write_text(json.dumps(described, default=list))
    set_field(directory / "processor_config.json", image_seq_length=4)


def glm(directory: Path) -> None:
    old = AutoProcessor.from_pretrained(directory)
    size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    images = hf.Glm4vImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, size=size)
    type(old)(images, old.tokenizer, chat_template=old.chat_template).save_pretrained(directory)
    tokenizer = old.tokenizer
    tokenizer.add_tokens(["<|begin_of_video|>", "<|video|>", "<|end_of_video|>"], special_tokens=True)
    tokenizer.save_pretrained(directory)
    described = images.to_dict() | {"processor_class": "Glm4vProcessor"}
    (directory / "preprocessor_config.json").write_text(json.dumps(described, default=list))


def tiles(directory: Path) -> None:
    named = {"image_token": "<image>", "video_token": "<unk>"}
    AutoTokenizer.from_pretrained(directory, extra_special_tokens=named).save_pretrained(directory)
    set_field(directory / "processor_config.json", num_image_tokens=4)


def set_field(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


OWN: dict[str, Callable[[Path], None]] = {
    "mistral3": rows, "internvl": framed, "glm4v": glm, "llava_onevision": tiles,
}  # fmt: skip
