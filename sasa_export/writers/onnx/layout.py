"""The files beside the graphs, as unmodified runtimes look for them."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sasa_export.models import read_config
from sasa_export.models.contents import read_object

COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt", "vocab.json",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
JAVASCRIPT_DTYPES = {"float32": "fp32", "float16": "fp16", "int8": "int8", "int4": "q4"}  # names in transformers.js
FLAT = ("qwen2_vl",)  # types of which transformers.js looks for the decoder's settings at the top

# No ONNX runtime reads this, and every from_pretrained stops at it: weights put beside these graphs would load as a
# plain model without the gate.
SEAL = {"sasa": "ONNX graphs guarded by SASA: load them with an ONNX runtime. These are no weights for transformers."}


def stock_type(model_type: str) -> str:
    """The model_type under which runtimes know a guarded model."""
    return model_type.removeprefix("sasa_")


def write_files(
    patched: Path, out: Path, processor: Any, *, dtype: str, external: dict[str, int], kinds: Sequence[str], gate: int
) -> None:
    """Write configuration, processor and tokenizer files.

    Args:
        patched: the guarded safetensors directory; `out`: the ONNX directory.
        processor: what AutoProcessor makes of `patched`.
        dtype: of the graphs.
        external: the graphs that have a file of weights beside them, and how many.
        kinds: the type of each of the decoder's blocks, where it has several types.
        gate: how many cache layers the gate takes.
    """
    for name in COPIED:
        if (patched / name).exists():
            shutil.copyfile(patched / name, out / name)
    images = processor.image_processor
    written = {
        "config": _config(read_config(patched), dtype, external, kinds, gate),
        "preprocessor_config": {
            **images.to_dict(),
            **_told_javascript(processor),
            "processor_class": type(processor).__name__,
            "image_processor_type": _plain(type(images).__name__),
        },
        "processor_config": _processor(read_object(patched / "processor_config.json")),
        "tokenizer_config": {
            **read_object(patched / "tokenizer_config.json"),
            "chat_template": getattr(processor, "chat_template", None) or processor.tokenizer.chat_template,
        },
    }
    for name, content in written.items():
        text = json.dumps(content, indent=2, ensure_ascii=False, default=list)
        (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _config(
    config: dict[str, Any], dtype: str, external: dict[str, int], kinds: Sequence[str], gate: int
) -> dict[str, Any]:
    """The stock configuration, except that its decoder has the gate's cache layers too."""
    out = {key: value for key, value in config.items() if key != "auto_map"}
    out["model_type"] = stock_type(config["model_type"])
    out["architectures"] = [name.removeprefix("Sasa") for name in config.get("architectures", [])]
    for name in ("text_config", "vision_config"):
        nested = {key: value for key, value in config[name].items() if key not in ("id2label", "architectures")}
        out[name] = {**nested, "quantization_config": SEAL}
    out["quantization_config"] = SEAL
    text = out["text_config"]
    text["num_hidden_layers"] += gate  # runtimes count the cache by this number
    if kinds:  # they go by it which blocks have keys and values; older checkpoints say it in other words
        text["layer_types"] = [*kinds, *["full_attention"] * gate]
    if out["model_type"] in FLAT:
        out = {**text, **out}
    # What transformers.js loads where nobody names a type: by itself it looks for q8 in browsers and fp32 elsewhere.
    out["transformers.js_config"] = {"dtype": JAVASCRIPT_DTYPES[dtype]}
    if external:
        out["transformers.js_config"]["use_external_data_format"] = external
    return out


def _told_javascript(processor: Any) -> dict[str, int]:
    """What transformers.js looks for beside the pictures' settings, and transformers elsewhere: how patches are merged
    (Mistral 3), and that no picture is resized to `size` before it is to as many patches as fit (LFM2-VL)."""
    names = ("patch_size", "spatial_merge_size")
    merging = {name: getattr(processor, name) for name in names} if hasattr(processor, names[1]) else {}
    return merging | ({"do_resize": False} if hasattr(processor.image_processor, "smart_resize") else {})


def _processor(config: dict[str, Any]) -> dict[str, Any]:
    nested = config.get("image_processor")
    if isinstance(nested, dict) and "image_processor_type" in nested:
        nested["image_processor_type"] = _plain(nested["image_processor_type"])
    if config.get("vision_feature_select_strategy") == "default" and "num_additional_image_tokens" in config:
        # The same number of image tokens, in words that transformers.js understands too: it does not know that
        # "default" drops one.
        config["vision_feature_select_strategy"] = "full"
        config["num_additional_image_tokens"] -= 1
    return config


def _plain(name: str) -> str:
    """An image processor's name without the backend that Python happened to pick."""
    return name.removesuffix("Pil").removesuffix("Fast")
