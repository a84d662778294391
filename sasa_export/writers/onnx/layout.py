"""The files beside the graphs, as unmodified runtimes look for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt", "vocab.json",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


# No ONNX runtime reads this, and every from_pretrained stops at it: weights put beside these graphs would load as a
# plain model without the gate.
SEAL = {"sasa": "ONNX graphs guarded by SASA: load them with an ONNX runtime. These are no weights for transformers."}


def stock_type(model_type: str) -> str:
    """The model_type under which runtimes know a guarded model."""
    return model_type.removeprefix("sasa_")


def write_files(patched: Path, out: Path, processor: Any, *, external: dict[str, int], gate: int) -> None:
    """Write configuration, processor and tokenizer files.

    Args:
        patched: the guarded safetensors directory; `out`: the ONNX directory.
        processor: what AutoProcessor makes of `patched`.
        external: the graphs that have a file of weights beside them, and how many.
        gate: how many cache layers the gate takes.
    """
    for name in COPIED:
        if (patched / name).exists():
            shutil.copyfile(patched / name, out / name)
    _write(out / "config.json", _config(_read(patched / "config.json"), external, gate))
    described = processor.image_processor.to_dict()
    described["processor_class"] = type(processor).__name__
    described["image_processor_type"] = _plain(type(processor.image_processor).__name__)
    _write(out / "preprocessor_config.json", described)
    _write(out / "processor_config.json", _processor(_read(patched / "processor_config.json")))
    tokenizer = _read(patched / "tokenizer_config.json")
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    _write(out / "tokenizer_config.json", {**tokenizer, "chat_template": template})


def _config(config: dict[str, Any], external: dict[str, int], gate: int) -> dict[str, Any]:
    """The stock configuration, except that its decoder has the gate's cache layers too."""
    out = {key: value for key, value in config.items() if key != "auto_map"}
    out["model_type"] = stock_type(config["model_type"])
    out["architectures"] = [name.removeprefix("Sasa") for name in config.get("architectures", [])]
    for name in ("text_config", "vision_config"):
        if name in out:
            nested = {key: value for key, value in out[name].items() if key not in ("id2label", "architectures")}
            out[name] = {**nested, "quantization_config": SEAL}
    out["quantization_config"] = SEAL
    text = out["text_config"]
    # Runtimes count the cache by this number.
    text["num_hidden_layers"] += gate
    if "layer_types" in text:
        text["layer_types"] += ["full_attention"] * gate
    if external:
        out["transformers.js_config"] = {"use_external_data_format": external}
    return out


def _processor(config: dict[str, Any]) -> dict[str, Any]:
    out = dict(config)
    nested = out.get("image_processor")
    if isinstance(nested, dict) and "image_processor_type" in nested:
        out["image_processor"] = {**nested, "image_processor_type": _plain(nested["image_processor_type"])}
    if out.get("vision_feature_select_strategy") == "default" and "num_additional_image_tokens" in out:
        # The same number of image tokens, in words that transformers.js understands too: it does not know that
        # "default" drops one.
        out["vision_feature_select_strategy"] = "full"
        out["num_additional_image_tokens"] -= 1
    return out


def _plain(name: str) -> str:
    """An image processor's name without the backend that Python happened to pick."""
    return name.removesuffix("Pil").removesuffix("Fast")


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=list) + "\n", encoding="utf-8")
