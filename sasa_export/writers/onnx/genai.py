"""genai_config.json: what onnxruntime-genai has to be told to run the graphs on text, as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sasa_export.writers.onnx import DECODER, EMBEDDING, SUFFIX
from sasa_export.writers.onnx.decoder import Decoder

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams")


def write_genai_config(out: Path, model: Any, *, dtype: str) -> None:
    """Write the file for a guarded model whose positions have one axis.

    It has no type that drives the vision graph with this embedding, so that pictures are not fed.
    """
    text, settings = model.config.get_text_config(decoder=True), model.generation_config.to_dict()
    decoder = Decoder(model)
    names = decoder.signature(1, {})
    _, heads, _, size = names.inputs["past_key_values.0.key"]
    outputs = [name for name in names.outputs if name != "is_due"]  # one that is left out here ends in a crash
    described = {
        "hidden_size": text.hidden_size, "head_size": size, "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": heads, "num_hidden_layers": decoder.layers,
        "inputs": {
            **{name: name for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids")},
            "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value",
        },
        "pipeline": [
            {EMBEDDING: _stage(EMBEDDING, dtype, ["input_ids"], ["inputs_embeds"])},
            {DECODER: _stage(DECODER, dtype, list(names.inputs), outputs)},
        ],
    }  # fmt: skip
    length = text.max_position_embeddings
    config = {
        "model": {
            "type": "decoder-pipeline", "vocab_size": text.vocab_size, "context_length": length, **_set(settings, IDS),
            "decoder": described,
        },
        "search": {**_set(settings, SEARCH), "max_length": length, "past_present_share_buffer": False},
    }  # fmt: skip
    (out / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _stage(name: str, dtype: str, inputs: list[str], outputs: list[str]) -> dict[str, Any]:
    return {"filename": f"onnx/{name}{SUFFIX[dtype]}.onnx", "inputs": inputs, "outputs": outputs}


def _set(settings: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: settings[name] for name in names if settings.get(name) is not None}
