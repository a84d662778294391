"""An ONNX directory's three graphs, driven with onnxruntime and numpy as any runtime would drive them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from transformers import AutoProcessor

TYPES: dict[str, Any] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(bool)": np.bool_,
}  # fmt: skip
# What generation_config.json may hold that changes a greedy answer, and the value that changes nothing.
CHANGES: dict[str, Any] = {
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "sequence_bias": None,
    "min_length": 0, "min_new_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "exponential_decay_length_penalty": None,
    "guidance_scale": None, "encoder_repetition_penalty": 1.0,
}  # fmt: skip


class Model:
    """The three graphs of a directory, and what its configuration says about them.

    Args:
        directory: the ONNX directory.
        suffix: what the names of its graphs end with before `.onnx`.
        device: "cuda", or any other for the CPU.
    """

    tensors = "np"

    def __init__(self, directory: Path, suffix: str, device: str) -> None:
        self.vision, self.embedding, self.decoder = (
            session(directory / "onnx" / f"{name}{suffix}.onnx", device)
            for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
        )
        self.processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
        self.config = read_json(directory / "config.json")
        self.image_token = int(self.config.get("image_token_id") or self.config["image_token_index"])
        self.names = [value.name for value in self.decoder.get_outputs()]
        self.axes = next(len(v.shape) for v in self.decoder.get_inputs() if v.name == "position_ids") - 1
        path = directory / "generation_config.json"
        settings = read_json(path) if path.exists() else {}
        ends = settings.get("eos_token_id", self.processor.tokenizer.eos_token_id)
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.penalty = float(settings.get("repetition_penalty") or 1.0)
        changes = sorted(name for name, idle in CHANGES.items() if settings.get(name, idle) not in (idle, None))
        self.about: dict[str, Any] = {"provider": self.decoder.get_providers()[0], "not_followed": changes}

    def answer(self, inputs: dict[str, Any], count: int) -> tuple[float, NDArray[Any], list[int]]:
        """The greedy answer to one prompt: P(unsafe), the first logits (vocabulary,), and at most `count` tokens."""
        prompt, positions = inputs["input_ids"][0].tolist(), self._positions(inputs)
        first, probability, cache = self._prompt(inputs)
        logits, answer = first, list[int]()
        position = positions.max() + 1
        while True:
            answer.append(int(penalised(logits, prompt + answer, self.penalty).argmax()))
            if answer[-1] in self.ends or len(answer) == count:
                return probability, first, answer
            embeds = self.embedding.run(None, {"input_ids": np.array([answer[-1:]], np.int64)})[0]  # (1, 1, hidden)
            at = np.full_like(positions[..., :1], position + len(answer) - 1)
            logits, _, cache = self._call(embeds, len(prompt) + len(answer), at, cache, {})

    def judge(self, inputs: dict[str, Any]) -> float:
        """P(unsafe) of one prompt alone."""
        return self._prompt(inputs)[1]

    def _prompt(self, inputs: dict[str, Any]) -> tuple[NDArray[Any], float, dict[str, Any]]:
        """A whole prompt on an empty cache: logits (vocabulary,), P(unsafe), and the cache after it."""
        cache = {
            value.name: onnxruntime.OrtValue.ortvalue_from_numpy(empty(value.shape, TYPES[value.type]))
            for value in self.decoder.get_inputs()
            if value.name.startswith("past_")
        }
        optional = {value.name for value in self.decoder.get_overridable_initializers()}
        extra = {name: inputs[name].astype(np.int64) for name in optional if name in inputs}
        return self._call(self._embed(inputs), inputs["input_ids"].shape[1], self._positions(inputs), cache, extra)

    def _call(
        self, embeds: NDArray[Any], length: int, positions: NDArray[Any], cache: dict[str, Any], extra: dict[str, Any]
    ) -> tuple[NDArray[Any], float, dict[str, Any]]:
        """One call, after which `length` tokens were fed: logits (vocabulary,), P(unsafe), and the cache after it."""
        arrays = {
            "inputs_embeds": embeds, "attention_mask": np.ones((1, length), np.int64),
            "position_ids": positions.astype(np.int64), **extra,
        }  # fmt: skip
        feed = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in arrays.items()}
        values = dict(zip(self.names, self.decoder.run_with_ort_values(self.names, {**feed, **cache}), strict=True))
        present = (value for name, value in values.items() if name.startswith("present"))
        cache = dict(zip(cache, present, strict=True))  # in one order
        return values["logits"].numpy()[0, -1], float(values["unsafe_probability"].numpy()[0]), cache

    def _embed(self, inputs: dict[str, Any]) -> NDArray[Any]:
        """A prompt with its picture's features in place, (1, tokens, hidden)."""
        ids = inputs["input_ids"].astype(np.int64)  # (1, tokens)
        embeds: NDArray[Any] = self.embedding.run(None, {"input_ids": ids})[0]
        if "pixel_values" in inputs:
            taken = [*self.vision.get_inputs(), *self.vision.get_overridable_initializers()]
            given = {"grid_thw": inputs.get("image_grid_thw"), **inputs}  # by the name that Qwen2-VL's graph has
            features = self.vision.run(None, {v.name: given[v.name].astype(TYPES[v.type]) for v in taken})[0]
            embeds[ids == self.image_token] = features.reshape(-1, features.shape[-1])  # raises where numbers differ
        return embeds

    def _positions(self, inputs: dict[str, Any]) -> NDArray[Any]:
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


def session(path: Path, device: str) -> Any:
    """One graph, ready to run."""
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        onnxruntime.preload_dlls()
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": 0}))  # float32 is to mean float32
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=providers)


def empty(shape: list[Any], dtype: Any) -> NDArray[Any]:
    """What one input of the cache holds of one prompt before its first token, whose lengths go by names in `shape`."""
    return np.zeros([1, *(size if isinstance(size, int) else 0 for size in shape[1:])], dtype)


def penalised(logits: NDArray[Any], tokens: list[int], penalty: float) -> NDArray[Any]:
    """Logits (vocabulary,) with those of earlier tokens made less likely, as transformers does."""
    earlier = np.unique(tokens)
    logits = logits.copy()
    logits[earlier] = np.where(logits[earlier] < 0, logits[earlier] * penalty, logits[earlier] / penalty)
    return logits


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))
