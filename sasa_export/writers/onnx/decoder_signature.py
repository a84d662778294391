"""What goes into the decoder's graph and comes out of it: names, dimensions, and arguments to trace with."""

from __future__ import annotations

from typing import Any

import torch

from sasa_export.writers.onnx.decoder import Decoder
from sasa_export.writers.onnx.signature import Signature

# What the second lane computes, and what stands there where no verdict is due.
VERDICT: dict[str, float | str] = {"unsafe_probability": float("nan"), "sasa.judged": 0}
# What reading the context gives, and what stands there where the call cannot complete a prompt.
READING: dict[str, float | str] = {
    "unsafe_probability": float("nan"), "sasa.states": "sasa.going_on", "sasa.covered": 1,
}  # fmt: skip


def lane_outputs(decoder: Decoder) -> list[str]:
    """The outputs of the second lane: P(unsafe), what follows from it, and the lane's own cache layers."""
    if not decoder.every_token:
        return list(VERDICT)
    own = range(decoder.layers + decoder.shape.layers, decoder.count)
    caches = [f"present.{layer}.{kind}" for layer in own for kind in ("key", "value")]
    return ["unsafe_probability", "sasa.states", *caches]


def signature_of(decoder: Decoder, position_axes: int, extra: dict[str, tuple[str | int, ...]]) -> Signature:
    """Names and dimensions as runtimes expect them."""
    text = decoder.model.config.get_text_config(decoder=True)
    positions = ("batch_size", "sequence_length")
    inputs: dict[str, tuple[str | int, ...]] = {
        "inputs_embeds": ("batch_size", "sequence_length", text.hidden_size),
        "attention_mask": ("batch_size", "total_sequence_length"),
        "position_ids": positions if position_axes == 1 else (position_axes, *positions),
    }
    outputs: dict[str, tuple[str | int, ...]] = {"logits": ("batch_size", 1, text.vocab_size)}
    for layer in range(decoder.count):
        for kind in ("key", "value"):
            inputs[f"past_key_values.{layer}.{kind}"] = (
                "batch_size", decoder.shape.heads, "past_sequence_length", decoder.shape.size,
            )  # fmt: skip
            outputs[f"present.{layer}.{kind}"] = (
                "batch_size", decoder.shape.heads, "total_sequence_length", decoder.shape.size,
            )  # fmt: skip
    if decoder.guarded:
        outputs["unsafe_probability"] = ("batch_size",)
        tokens = ("batch_size", "sequence_length")
        if decoder.every_token:
            outputs["sasa.states"] = tokens
        else:
            outputs |= {"sasa.judged": tokens, "is_due": ()}
            outputs |= {"sasa.states": tokens, "sasa.covered": tokens, "sasa.going_on": tokens, "is_read": ()}
    return Signature(inputs | extra, outputs)


def example_of(decoder: Decoder, signature: Signature, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments to trace with: one call on top of a past, no two dimensions alike."""
    sizes = {"batch_size": 2, "sequence_length": 5, "past_sequence_length": 3, "total_sequence_length": 8}

    def make(name: str, kind: torch.dtype) -> torch.Tensor:
        shape = [sizes[size] if isinstance(size, str) else size for size in signature.inputs[name]]
        return torch.ones(shape, dtype=kind)

    past = [
        (make(f"past_key_values.{layer}.key", dtype), make(f"past_key_values.{layer}.value", dtype))
        for layer in range(decoder.count)
    ]
    standard = ("inputs_embeds", "attention_mask", "position_ids")
    extra = {
        name: make(name, torch.int64)
        for name in signature.inputs
        if name not in standard and not name.startswith("past_key_values.")
    }
    return (
        make("inputs_embeds", torch.float32), make("attention_mask", torch.int64),
        make("position_ids", torch.int64), past, extra,
    )  # fmt: skip
