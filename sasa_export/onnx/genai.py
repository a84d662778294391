"""Writes genai_config.json, which onnxruntime-genai needs to run the graphs."""

import json
from pathlib import Path

from sasa_export.onnx.flat import FlatDecoder

# This type runs a vision graph, an embedding that takes its features, and a decoder. It works for any model.
TYPE = "gemma3"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams")


def write_genai_config(out: Path, decoder: FlatDecoder, files: dict[str, str]) -> None:
    """Write the file for a decoder whose positions have one axis and whose cache has only keys and values. `files` are
    the graphs by role."""
    model = decoder.model
    text = model.config.get_text_config(decoder=True)
    settings = model.generation_config.to_dict()
    ids, search = ({name: settings[name] for name in of if settings.get(name) is not None} for of in (IDS, SEARCH))
    names = decoder.signature(1)
    _, heads, _, size = names.inputs["past_key_values.0.key"]
    described = {
        "filename": files["decoder"],
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
            "type": TYPE, "vocab_size": text.vocab_size, "context_length": length, **ids,
            "decoder": described,
            "vision": {
                "filename": files["vision"], "inputs": _same("pixel_values"), "outputs": _same("image_features"),
            },
            "embedding": {
                "filename": files["embedding"], "inputs": _same("input_ids", "image_features"),
                "outputs": _same("inputs_embeds"),
            },
        },
        "search": {**search, "max_length": length, "past_present_share_buffer": False},
    }  # fmt: skip
    (out / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _same(*names: str) -> dict[str, str]:
    """Map genai's names of inputs or outputs to the graph's names, which are the same."""
    return {name: name for name in names}
