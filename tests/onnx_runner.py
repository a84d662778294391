"""Drives an exported directory with plain onnxruntime, as any runtime would, to compare it with torch."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import feeding
import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from conftest import Guard
from numpy.typing import NDArray
from torch import Tensor

from sasa_export.models.family import onnx_recipes

Arrays = dict[str, NDArray[Any]]
TOLERANCE = 1e-4  # of logits and P(unsafe), beside torch
STEPS = 15  # beyond the end of the refusal
# Families that the stock transformers.js has a class for, and feeds as the original is fed.
JAVASCRIPT = [kind for kind, recipe in onnx_recipes().items() if recipe.transformers_js]
KINDS: dict[str, Any] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(bool)": np.bool_,
}  # fmt: skip


@lru_cache(maxsize=8)
def session(graph: Path | bytes, weights: Path | None = None, exact: bool = False) -> onnxruntime.InferenceSession:
    """A graph, or one in memory whose `weights` lie in a folder. Beyond the level of `exact`, casts between float16 and
    float32 are left out, in one graph and not in the other."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if exact:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    if weights:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def lane_of(decoder: ir.Model) -> ir.Graph:
    """The branch that holds the second lane."""
    (branch,) = (node for node in decoder.graph if node.op_type == "If")
    assert branch.name == "/sasa/lane"
    return branch.attributes["then_branch"].as_graph()


class Runner:
    """One conversation batch: `prompt` starts it, `step` feeds one token to each row, `call` feeds anything.

    After each call, `logits` is (batch, vocabulary) and `probability` is (batch,).
    """

    logits: Any
    probability: Any
    size: int | None = None  # of a head, where a graph does not say it

    def __init__(self, directory: Path, suffix: str = "") -> None:
        graphs = directory / "onnx"
        self.vision = session(graphs / f"vision_encoder{suffix}.onnx")
        self.embedding = session(graphs / f"embed_tokens{suffix}.onnx")
        self.use(session(graphs / f"decoder_model_merged{suffix}.onnx"))

    def use(self, decoder: Any) -> None:
        self.decoder, self.inputs = decoder, {value.name: value for value in decoder.get_inputs()}
        self.names = [value.name for value in decoder.get_outputs()]
        self.cache: Arrays = {}

    def prompt(self, inputs: Arrays, image_token: int, position_ids: NDArray[Any], **extra: NDArray[Any]) -> None:
        """Feed a processor's inputs, pictures and all."""
        embeds = self.embed_prompt(inputs, image_token)
        self.start(len(embeds))
        self.call(embeds, inputs["attention_mask"], position_ids, **extra)

    def ask(self, guard: Guard, inputs: Any) -> tuple[Tensor, Tensor]:
        """Feed a batch of a guard's. Position ids, (..., batch, tokens), and the next ones, (..., batch, 1)."""
        places, following = positions(guard, inputs)
        arrays = {name: value.numpy() for name, value in inputs.items()}
        further = {value.name for value in self.decoder.get_overridable_initializers()} & arrays.keys()
        self.prompt(arrays, image_token(guard), places.numpy(), **{name: arrays[name] for name in further})
        return places, following

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
        self.cache, self.mask = {}, np.zeros((batch, 0), np.int64)
        for name, value in self.inputs.items():
            if name.startswith("past"):
                sizes = [size if isinstance(size, int) else 0 for size in value.shape[1:]]
                if name.endswith((".key", ".value")):
                    sizes[2] = sizes[2] or self.size or 0
                self.cache[name] = np.zeros((batch, *sizes), KINDS[value.type])

    def embed(self, ids: NDArray[Any]) -> NDArray[Any]:
        """(batch, tokens) -> (batch, tokens, hidden)."""
        feed = {"input_ids": ids.astype(np.int64)}
        for value in self.embedding.get_inputs()[1:]:  # one that merges features gets none
            feed[value.name] = np.zeros((0, 1, value.shape[-1]), KINDS[value.type])
        embeds: NDArray[Any] = self.embedding.run(None, feed)[0]
        return embeds

    def call(self, embeds: NDArray[Any], mask: NDArray[Any], position_ids: NDArray[Any], **extra: NDArray[Any]) -> None:
        self.feed(embeds, mask, position_ids, **extra)
        self.logits = self.logits[:, -1].astype(np.float32)

    def feed(self, text: NDArray[Any], mask: NDArray[Any], position_ids: NDArray[Any], **extra: NDArray[Any]) -> None:
        """One call; the mask is of the whole context."""
        given = {"inputs_embeds": text, "input_ids": text, "attention_mask": mask, "position_ids": position_ids}
        feed = {
            name: array.astype(KINDS[self.inputs[name].type]) for name, array in given.items() if name in self.inputs
        }
        values = self.decoder.run(self.names, {**feed, **extra, **self.cache})
        self.mask, self.values = mask, dict(zip(self.names, values, strict=True))
        self.logits = self.values.get("logits")
        self.probability = self.values.get("unsafe_probability")
        present = {name: name.replace("past_key_values", "present").replace("past", "present") for name in self.cache}
        self.cache = {name: self.values[made] for name, made in present.items() if made in self.values}

    def pieces(self, embeds: NDArray[Any], mask: NDArray[Any], position_ids: NDArray[Any], ends: Sequence[int]) -> None:
        """A whole prompt anew, in calls that end at `ends`."""
        self.start(len(mask))
        for start, end in zip([0, *ends], ends, strict=False):
            self.call(embeds[:, start:end], mask[:, :end], position_ids[..., start:end])

    def step(self, ids: NDArray[Any], position_ids: NDArray[Any], **extra: NDArray[Any]) -> None:
        """One more token (batch,) for each row."""
        mask = np.concatenate([self.mask, np.ones((len(ids), 1), self.mask.dtype)], axis=1)
        self.call(self.embed(ids[:, None]), mask, position_ids, **extra)


def positions(guard: Guard, inputs: Any) -> tuple[Tensor, Tensor]:
    """Position ids of a prompt, (batch, tokens) or (3, batch, tokens), and the next one, (..., batch, 1)."""
    places = feeding.positions(guard, inputs)  # (..., batch, tokens)
    last = places if places.dim() == 2 else places.amax(0)  # (batch, tokens)
    return places, (last.amax(-1, keepdim=True) + 1).expand(*places.shape[:-1], 1)


def image_token(guard: Guard) -> int:
    config = guard.model.config
    return int(getattr(config, "image_token_id", None) or config.image_token_index)


def follow(guard: Guard, runner: Runner, inputs: Any, steps: int) -> tuple[list[int], list[float]]:
    """Run both on a prompt and, greedily, `steps` tokens more. Returns the rows' last state and all differences."""
    ids, following = runner.ask(guard, inputs)
    with torch.no_grad():
        output = guard.model(**inputs, position_ids=ids, use_cache=True)
    differences = [
        float(np.abs(runner.logits - output.logits[:, -1].numpy()).max()),
        float(np.abs(runner.probability - output.unsafe_probability.numpy()).max()),
    ]
    mask, cache = inputs["attention_mask"], output.past_key_values
    for _ in range(steps):
        token = output.logits[:, -1].argmax(-1)  # (batch,)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        with torch.no_grad():
            output = guard.model(
                input_ids=token[:, None], attention_mask=mask, position_ids=following, past_key_values=cache
            )
        runner.step(token.numpy(), following.numpy())
        assert runner.probability is not None
        assert np.isnan(runner.probability).all(), "a step of an answer was judged"
        differences.append(float(np.abs(runner.logits - output.logits[:, -1].numpy()).max()))
        following = following + 1
    blocks = guard.model.config.get_text_config().num_hidden_layers
    state = runner.cache[f"past_key_values.{blocks}.key"][:, 0, -1, 0]  # (batch,)
    return state.tolist(), differences
