"""Run in a fresh process: drive an ONNX directory's three graphs as any runtime would, and say what they do.

Imports numpy, onnxruntime, PIL and transformers' processor alone. Prints one JSON object as its last line.

Usage: python -I onnx_fresh.py DIRECTORY SUFFIX DEVICE TOKENS [PROMPTS]

PROMPTS is a folder with prompts.json and pictures: these prompts are judged, and not answered.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

BFLOAT16 = 16  # ONNX's number for the type that numpy does not have
TYPES: dict[str, Any] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bfloat16)": BFLOAT16,
    "tensor(int64)": np.int64, "tensor(bool)": np.bool_,
}  # fmt: skip
# What generation_config.json may hold that changes a greedy answer, and the value that changes nothing.
CHANGES: dict[str, Any] = {
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "sequence_bias": None,
    "min_length": 0, "min_new_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "exponential_decay_length_penalty": None,
    "guidance_scale": None, "encoder_repetition_penalty": 1.0,
}  # fmt: skip


class Graphs:
    """The three graphs of a directory, and what its configuration says about them."""

    def __init__(self, directory: Path, suffix: str, device: str) -> None:
        providers: list[Any] = ["CPUExecutionProvider"]
        if device == "cuda":
            if hasattr(onnxruntime, "preload_dlls"):
                onnxruntime.preload_dlls()
            providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": 0}))  # float32 is to mean float32
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.vision, self.embedding, self.decoder = (
            onnxruntime.InferenceSession(directory / "onnx" / f"{name}{suffix}.onnx", options, providers=providers)
            for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
        )
        self.providers = self.decoder.get_providers()
        self.config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self.image_token = int(self.config.get("image_token_id") or self.config["image_token_index"])
        self.names = [value.name for value in self.decoder.get_outputs()]
        self.axes = next(len(v.shape) for v in self.decoder.get_inputs() if v.name == "position_ids") - 1

    def embed(self, inputs: dict[str, Any]) -> NDArray[Any]:
        """A prompt with its picture's features in place, (1, tokens, hidden)."""
        ids = inputs["input_ids"].astype(np.int64)  # (1, tokens)
        embeds: NDArray[Any] = self.embedding.run(None, {"input_ids": ids})[0]
        if "pixel_values" in inputs:
            feed = {value.name: inputs[value.name].astype(TYPES[value.type]) for value in self.vision.get_inputs()}
            features = self.vision.run(None, feed)[0]
            places = ids == self.image_token  # (1, tokens)
            embeds[places] = features.reshape(-1, features.shape[-1])  # numpy raises where their numbers differ
        return embeds

    def positions(self, inputs: dict[str, Any]) -> NDArray[Any]:
        """Position ids of a prompt without padding: (1, tokens), or (3, 1, tokens) where a family has three axes."""
        ids = inputs["input_ids"][0]  # (tokens,)
        if self.axes == 1:
            return np.arange(len(ids))[None]
        merge = self.config["vision_config"]["spatial_merge_size"]
        columns: list[NDArray[Any]] = []
        grids = iter(inputs.get("image_grid_thw", ()))
        place, following = 0, 0
        while place < len(ids):
            if ids[place] == self.image_token:
                frames, height, width = (int(size) for size in next(grids))
                grid = np.indices((frames, height // merge, width // merge)).reshape(3, -1)  # (3, image tokens)
            else:
                grid = np.zeros((3, 1), np.int64)
            columns.append(grid + following)
            place += grid.shape[1]
            following = int(columns[-1].max()) + 1
        return np.concatenate(columns, axis=1)[:, None]

    def call(self, embeds: NDArray[Any], length: int, positions: NDArray[Any], cache: Any, extra: Any) -> Any:
        """One call: logits (vocabulary,), P(unsafe), and the cache after it."""
        arrays = {
            "inputs_embeds": embeds, "attention_mask": np.ones((1, length), np.int64),
            "position_ids": positions.astype(np.int64), **extra,
        }  # fmt: skip
        feed = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in arrays.items()}
        values = dict(zip(self.names, self.decoder.run_with_ort_values(self.names, {**feed, **cache}), strict=True))
        cache = {
            name.replace("present.", "past_key_values."): value
            for name, value in values.items()
            if name.startswith("present.")
        }
        return values["logits"].numpy()[0, -1], float(values["unsafe_probability"].numpy()[0]), cache

    def empty_cache(self) -> dict[str, Any]:
        return {
            value.name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                [1, value.shape[1], 0, value.shape[3]], TYPES[value.type]
            )
            for value in self.decoder.get_inputs()
            if value.name.startswith("past_key_values.")
        }

    def judge(self, inputs: dict[str, Any]) -> Any:
        """One prompt alone: its logits (vocabulary,), P(unsafe), and the cache after it."""
        optional = {value.name for value in self.decoder.get_overridable_initializers()}
        extra = {name: inputs[name].astype(np.int64) for name in optional if name in inputs}
        length = inputs["input_ids"].shape[1]
        return self.call(self.embed(inputs), length, self.positions(inputs), self.empty_cache(), extra)

    def answer(self, inputs: dict[str, Any], count: int, ends: set[int], penalty: float) -> Any:
        """The greedy answer to one prompt: P(unsafe), the first logits (vocabulary,), and at most `count` tokens."""
        first, probability, cache = self.judge(inputs)
        positions, length = self.positions(inputs), inputs["input_ids"].shape[1]
        logits, tokens = first, [*inputs["input_ids"][0].tolist()]
        position = positions.max() + 1
        for _ in range(count):
            if penalty != 1.0:
                logits = penalised(logits, tokens, penalty)
            tokens.append(int(logits.argmax()))
            if tokens[-1] in ends or len(tokens) == inputs["input_ids"].shape[1] + count:
                break
            embeds = self.embedding.run(None, {"input_ids": np.array([[tokens[-1]]], np.int64)})[0]
            length += 1
            logits, _, cache = self.call(embeds, length, np.full_like(positions[..., :1], position), cache, {})
            position += 1
        return probability, first, tokens[inputs["input_ids"].shape[1] :]


def penalised(logits: NDArray[Any], tokens: list[int], penalty: float) -> NDArray[Any]:
    """Logits (vocabulary,) with those of tokens that were said made less likely, as in transformers."""
    said = np.unique(tokens)
    logits = logits.copy()
    logits[said] = np.where(logits[said] < 0, logits[said] * penalty, logits[said] / penalty)
    return logits


def read(processor: Any, entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The model's inputs for a prompt, with its picture from `folder` if it has one."""
    content = [{"type": "text", "text": entry["prompt"]}]
    if entry["image"]:
        content.insert(0, {"type": "image", "image": Image.open(folder / entry["image"]).convert("RGB")})
    return dict(
        processor.apply_chat_template(
            [[{"role": "user", "content": content}]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"return_tensors": "np"},
        )
    )


def main(directory: Path, suffix: str, device: str, count: int, prompts: Path | None = None) -> dict[str, Any]:
    from transformers import AutoProcessor, logging

    logging.set_verbosity_error()
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
    graphs = Graphs(directory, suffix, device)
    path = directory / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    ends = settings.get("eos_token_id", processor.tokenizer.eos_token_id)
    ends = set(ends if isinstance(ends, list) else [ends])
    result: dict[str, Any] = {
        "provider": graphs.providers[0],
        "changes": sorted(name for name, idle in CHANGES.items() if settings.get(name, idle) not in (idle, None)),
        "cases": [],
    }
    folder = directory / "sasa-verify"
    for case in json.loads((folder / "cases.json").read_text(encoding="utf-8"))["cases"]:
        probability, first, tokens = graphs.answer(
            read(processor, case, folder), count, ends, float(settings.get("repetition_penalty") or 1.0)
        )
        logits = [float(first[token]) for token, _ in case.get("logits", ())]
        entry = {"unsafe_probability": probability, "tokens": tokens, "logits": logits}
        result["cases"].append({**entry, "finite": bool(np.isfinite(first).all())})
    if prompts is not None:
        entries = json.loads((prompts / "prompts.json").read_text(encoding="utf-8"))
        result["judged"] = [graphs.judge(read(processor, entry, prompts))[1] for entry in entries]
    return result


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), *map(Path, sys.argv[5:]))))
