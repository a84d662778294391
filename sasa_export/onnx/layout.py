"""Writes the configurations beside the graphs as unmodified runtimes expect them."""

import json
from pathlib import Path
from typing import Any

from sasa_export.models import Source
from sasa_export.models.contents import read_object
from sasa_export.onnx.recipes import recipe_of

# Sizes that runtimes need. A config.json may leave out default values.
SIZES = (
    "num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"
)  # fmt: skip


def write_files(source: Source, out: Path, processor: Any, text: Any, external: dict[str, int]) -> None:
    """Write the configurations that runtimes expect in other files, or under other names, than transformers.

    Args:
        out: the directory that already holds the source's files.
        processor, text: the source's processor, and its decoder's configuration with defaults filled in.
        external: graph -> number of weight files beside it.
    """
    images = processor.image_processor
    written = {
        "config": _config(source.config, text, external),
        "preprocessor_config": {
            **images.to_dict(),
            **_told_javascript(processor),
            "processor_class": type(processor).__name__,
            "image_processor_type": _plain(type(images).__name__),
        },
        "processor_config": _processor(read_object(source.directory / "processor_config.json")),
        "tokenizer_config": {
            **read_object(source.directory / "tokenizer_config.json"),
            "chat_template": getattr(processor, "chat_template", None) or processor.tokenizer.chat_template,
        },
    }
    for name, content in written.items():
        content_text = json.dumps(content, indent=2, ensure_ascii=False, default=list)
        (out / f"{name}.json").write_text(content_text + "\n", encoding="utf-8")


def _config(config: dict[str, Any], text: Any, external: dict[str, int]) -> dict[str, Any]:
    """Return the source's configuration, with the defaults of the decoder's sizes filled in."""
    said = {name: value for name in SIZES if (value := getattr(text, name, None)) is not None}
    said |= config.get("text_config", {})
    if kinds := getattr(text, "layer_types", None):  # older checkpoints name it otherwise
        said["layer_types"] = list(kinds)
    out = {**config, "text_config": said}
    out = {**said, **out} if recipe_of(out["model_type"]).flat_config else out
    return {**out, "transformers.js_config": {"use_external_data_format": external} if external else {}}


def _told_javascript(processor: Any) -> dict[str, int]:
    """Return settings that transformers.js reads beside the pictures' settings, and transformers elsewhere. Mistral 3:
    how patches merge. LFM2-VL: no resize to `size` before the resize to as many patches as fit."""
    names = ("patch_size", "spatial_merge_size")
    merging = {name: getattr(processor, name) for name in names} if hasattr(processor, names[1]) else {}
    return merging | ({"do_resize": False} if hasattr(processor.image_processor, "smart_resize") else {})


def _processor(config: dict[str, Any]) -> dict[str, Any]:
    nested = config.get("image_processor")
    if isinstance(nested, dict) and "image_processor_type" in nested:
        nested["image_processor_type"] = _plain(nested["image_processor_type"])
    if config.get("vision_feature_select_strategy") == "default" and "num_additional_image_tokens" in config:
        # The same number of image tokens, for transformers.js: it does not know that "default" drops one.
        config["vision_feature_select_strategy"] = "full"
        config["num_additional_image_tokens"] -= 1
    return config


def _plain(name: str) -> str:
    """Return an image processor's name without the backend that transformers picked."""
    return name.removesuffix("Pil").removesuffix("Fast")
