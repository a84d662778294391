"""Drives an exported directory with plain onnxruntime, as any runtime would, to compare it with torch."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime
import tiny
from numpy.typing import NDArray
from torch import Tensor

Arrays = dict[str, NDArray[Any]]
# Families that the stock transformers.js has a class for, and feeds as the original is fed.
JAVASCRIPT = ("llava", "smolvlm", "idefics3", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3", "lfm2_vl")
KINDS: dict[str, Any] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(bool)": np.bool_,
}  # fmt: skip


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def lane_of(decoder: ir.Model) -> ir.Graph:
    """The branch that holds the second lane."""
    (branch,) = (node for node in decoder.graph if node.op_type == "If")
    assert branch.name == "/sasa/lane"
    return branch.attributes["then_branch"].as_graph()


class Runner:
    """One conversation batch: `prompt` starts it, `step` feeds one token to each row, `call` feeds anything.

    After each call, `logits` is (batch, vocabulary) and `probability` is (batch,).
    """

    def __init__(self, directory: Path, suffix: str = "") -> None:
        graphs = directory / "onnx"
        self.vision = session(graphs / f"vision_encoder{suffix}.onnx")
        self.embedding = session(graphs / f"embed_tokens{suffix}.onnx")
        self.decoder = session(graphs / f"decoder_model_merged{suffix}.onnx")
        self.names = [value.name for value in self.decoder.get_outputs()]
        self.cache: Arrays = {}

    def prompt(self, inputs: Arrays, image_token: int, position_ids: NDArray[Any], **extra: NDArray[Any]) -> None:
        """Feed a processor's inputs, pictures and all."""
        embeds = self.embed_prompt(inputs, image_token)
        self.start(len(embeds))
        self.call(embeds, inputs["attention_mask"], position_ids, **extra)

    def embed_prompt(self, inputs: Arrays, image_token: int) -> NDArray[Any]:
        """A processor's inputs with the features of the pictures in place, (batch, tokens, hidden)."""
        embeds = self.embed(inputs["input_ids"])  # (batch, tokens, hidden)
        if "pixel_values" in inputs:
            taken = [*self.vision.get_inputs(), *self.vision.get_overridable_initializers()]
            fed = {"grid_thw": inputs.get("image_grid_thw", np.empty(0)), **inputs}
            features = self.vision.run(None, {v.name: fed[v.name].astype(KINDS[v.type]) for v in taken})[0]
            features = features.reshape(-1, features.shape[-1])  # (image tokens, hidden)
            places = inputs["input_ids"] == image_token  # (batch, tokens)
            assert places.sum() == len(features)
            embeds[places] = features
        return embeds

    def start(self, batch: int) -> None:
        """Forget everything: an empty cache for `batch` rows."""
        self.cache = {}
        for value in self.decoder.get_inputs():
            if value.name.startswith("past_"):
                sizes = [size if isinstance(size, int) else 0 for size in value.shape[1:]]
                self.cache[value.name] = np.zeros((batch, *sizes), KINDS[value.type])

    def embed(self, ids: NDArray[Any]) -> NDArray[Any]:
        """(batch, tokens) -> (batch, tokens, hidden)."""
        embeds: NDArray[Any] = self.embedding.run(None, {"input_ids": ids.astype(np.int64)})[0]
        return embeds

    def call(self, embeds: NDArray[Any], mask: NDArray[Any], position_ids: NDArray[Any], **extra: NDArray[Any]) -> None:
        feed = {
            "inputs_embeds": embeds, "attention_mask": mask.astype(np.int64),
            "position_ids": position_ids.astype(np.int64), **extra, **self.cache,
        }  # fmt: skip
        self.mask = mask
        values = dict(zip(self.names, self.decoder.run(self.names, feed), strict=True))
        self.logits = values["logits"][:, -1].astype(np.float32)
        self.probability = values.get("unsafe_probability")
        present = (value for name, value in values.items() if name.startswith("present"))
        self.cache = dict(zip(self.cache, present, strict=True))

    def step(self, ids: NDArray[Any], position_ids: NDArray[Any], **extra: NDArray[Any]) -> None:
        """One more token (batch,) for each row."""
        mask = np.concatenate([self.mask, np.ones((len(ids), 1), self.mask.dtype)], axis=1)
        self.call(self.embed(ids[:, None]), mask, position_ids, **extra)


def batch(
    guard: Any, *, count: int, side: Literal["left", "right"] = "left", images: bool = True, seed: int = 1
) -> Any:
    return tiny.prompts(guard.processor, images=images, count=count, seed=seed, padding_side=side)


def positions(guard: Any, inputs: Any) -> tuple[Tensor, Tensor]:
    """Position ids of a prompt, (batch, tokens) or (3, batch, tokens), and the next one, (..., batch, 1)."""
    mask = inputs["attention_mask"]  # (batch, tokens)
    flat = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)  # (batch, tokens)
    if not hasattr(guard.model.model, "get_rope_index"):
        return flat, flat[:, -1:] + 1
    if "image_grid_thw" not in inputs:
        axes = flat.expand(3, -1, -1)  # (3, batch, tokens)
        return axes, axes[..., -1:] + 1
    axes, deltas = guard.model.model.get_rope_index(
        inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"], attention_mask=mask,
    )  # fmt: skip
    return axes, (flat[:, -1:] + 1 + deltas).expand(3, -1, -1)


def image_token(guard: Any) -> int:
    config = guard.model.config
    return int(getattr(config, "image_token_id", None) or config.image_token_index)
