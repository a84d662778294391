"""genai_config.json: what onnxruntime-genai has to be told to run the graphs."""

import json
from pathlib import Path
from typing import Any

from sasa_export.writers.onnx import DECODER, MERGING, SUFFIX, VISION
from sasa_export.writers.onnx.decoder import Decoder

# A type that runs a vision graph, an embedding that takes its features, and a decoder: nothing in it is Gemma's.
TYPE = "gemma3"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams")


def write_genai_config(out: Path, decoder: Decoder, *, dtype: str) -> None:
    """Write the file for a guarded decoder whose positions have one axis and whose cache has keys and values alone."""
    model = decoder.model
    text, settings = model.config.get_text_config(decoder=True), model.generation_config.to_dict()
    names = decoder.signature(1, {})
    _, heads, _, size = names.inputs["past_key_values.0.key"]
    described = {
        "filename": _file(DECODER, dtype),
        "hidden_size": text.hidden_size, "head_size": size, "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": heads, "num_hidden_layers": decoder.layers,
        "inputs": {
            **_same("inputs_embeds", "attention_mask", "position_ids"),
            "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value",
        },
    }  # fmt: skip
    length = text.max_position_embeddings
    config = {
        "model": {
            "type": TYPE, "vocab_size": text.vocab_size, "context_length": length, **_set(settings, IDS),
            "decoder": described,
            "vision": {
                "filename": _file(VISION, dtype), "inputs": _same("pixel_values"), "outputs": _same("image_features"),
            },
            "embedding": {
                "filename": _file(MERGING, dtype), "inputs": _same("input_ids", "image_features"),
                "outputs": _same("inputs_embeds"),
            },
        },
        "search": {**_set(settings, SEARCH), "max_length": length, "past_present_share_buffer": False},
    }  # fmt: skip
    (out / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _file(name: str, dtype: str) -> str:
    return f"onnx/{name}{SUFFIX[dtype]}.onnx"


def _same(*names: str) -> dict[str, str]:
    """What genai calls an input or output, and what the graph calls it."""
    return {name: name for name in names}


def _set(settings: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: settings[name] for name in names if settings.get(name) is not None}
