"""Runs the graphs of an ONNX directory with onnxruntime and numpy, as any runtime does."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from transformers import AutoProcessor, AutoTokenizer, RepetitionPenaltyLogitsProcessor

from sasa_export.models.contents import read_object
from sasa_export.onnx import graphs_of

TYPES: dict[str, Any] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}  # fmt: skip


class Texts:
    """A tokenizer with the interface of a processor: each message is a list of text parts."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.chat_template = tokenizer, tokenizer.chat_template
        chat = [{"role": "user", "content": "word"}]  # some templates accept only parts
        self.joins = self.chat_template is None or "word" in tokenizer.apply_chat_template(chat, tokenize=False)

    def apply_chat_template(
        self, chat: Any, *, tokenize: bool = False, processor_kwargs: Any = None, **rest: Any
    ) -> Any:
        chat = _joined(chat) if self.joins else chat
        return self.tokenizer.apply_chat_template(chat, tokenize=tokenize, **rest, **(processor_kwargs or {}))


def _joined(chat: Any) -> Any:
    """Return a chat, or several, with the parts of each message joined."""
    if isinstance(chat, list):
        return [_joined(part) for part in chat]
    said = chat["content"]
    return {**chat, "content": said if isinstance(said, str) else "".join(part["text"] for part in said)}


def processor_of(directory: Path, *, pictures: bool) -> Any:
    """Return the processor for a directory's prompts with `pictures`, or for text alone."""
    if pictures:
        return AutoProcessor.from_pretrained(directory, trust_remote_code=False)
    return Texts(AutoTokenizer.from_pretrained(directory, trust_remote_code=False, padding_side="left"))


class Model:
    """The graphs of a directory, with the settings in its configuration.

    Args:
        directory: the ONNX directory.
        device: "cuda", or any other value for the CPU.
        told: replaces the entry `sasa` of config.json: `graphs`, the files by role, and `lengths`, the sizes of the
            cache's named dimensions.
        decoder: a session that replaces the directory's decoder.
    """

    def __init__(
        self, directory: Path, device: str = "cpu", told: dict[str, Any] | None = None, decoder: Any = None
    ) -> None:
        self.config = read_object(directory / "config.json")
        told = told or graphs_of(directory)
        graphs, self.lengths = told["graphs"], told.get("lengths", {})
        self.decoder = decoder or session(directory / graphs["decoder"], device)
        self.embedding, self.vision = (
            session(directory / graphs[role], device) if role in graphs else None for role in ("embedding", "vision")
        )
        self.processor = processor_of(directory, pictures=self.vision is not None)
        image_token = self.config.get("image_token_id") or self.config.get("image_token_index")
        self.image_token = -1 if image_token is None else int(image_token)
        self.taken = {value.name: value for value in self.decoder.get_inputs()}
        self.names = [value.name for value in self.decoder.get_outputs()]
        self.axes = len(self.taken["position_ids"].shape) - 1 if "position_ids" in self.taken else 1
        genai = read_object(directory / "genai_config.json").get("model", {})
        settings = {**genai, **read_object(directory / "generation_config.json")}
        ends = settings.get("eos_token_id", self.processor.tokenizer.eos_token_id)
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.penalise = RepetitionPenaltyLogitsProcessor(float(settings.get("repetition_penalty") or 1.0))

    def answer(self, inputs: dict[str, Any], count: int) -> tuple[float, NDArray[Any], list[int]]:
        """Return P(unsafe) of one prompt, the first logits (vocabulary,), and at most `count` tokens of the answer."""
        fed, positions, answer = inputs["input_ids"][0].tolist(), self._positions(inputs), list[int]()
        values = self.prompt(inputs)
        probability, first = _probability(values), None
        while True:
            logits = values["logits"].numpy()[0, -1].astype(np.float32)  # (vocabulary,)
            first = logits if first is None else first
            scores = self.penalise(torch.tensor([fed + answer]), torch.from_numpy(logits)[None])  # (1, ...)
            answer.append(int(scores.argmax()))
            if answer[-1] in self.ends or len(answer) == count:
                return probability, first, answer
            text = self._embed({"input_ids": np.array([answer[-1:]], np.int64)})  # (1, 1), or (1, 1, hidden)
            at = np.full_like(positions[..., :1], positions.max() + len(answer))
            values = self._call(text, len(fed) + len(answer), at, self.after(values), {})

    def judge(self, inputs: dict[str, Any], cuts: Sequence[int] = ()) -> float:
        """Return P(unsafe) of one prompt, fed whole, or in several calls that begin at `cuts`."""
        return _probability(self.prompt(inputs, cuts))

    def prompt(self, inputs: dict[str, Any], cuts: Sequence[int] = ()) -> dict[str, Any]:
        """Feed a prompt on an empty cache, with a new call at each of `cuts`. Return the last call's named outputs."""
        cache = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(empty(value.shape, TYPES[value.type], self.lengths))
            for name, value in self.taken.items()
            if name.startswith("past")
        }
        optional = {value.name for value in self.decoder.get_overridable_initializers()}
        extra = {name: inputs[name].astype(np.int64) for name in optional if name in inputs}
        text, positions, values = self._embed(inputs), self._positions(inputs), dict[str, Any]()
        for part in np.split(np.arange(text.shape[1]), cuts):
            some = {name: value[:, part] for name, value in extra.items()}
            values = self._call(text[:, part], int(part[-1]) + 1, positions[..., part], cache, some)
            cache = self.after(values)
        return values

    def after(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the cache that a call gave, as inputs of the next call."""
        pairs = ((name, re.sub(r"^past(_key_values)?", "present", name)) for name in self.taken)
        return {name: values[present] for name, present in pairs if present in values}

    def _call(
        self, text: NDArray[Any], length: int, positions: NDArray[Any], cache: dict[str, Any], extra: dict[str, Any]
    ) -> dict[str, Any]:
        """Run one call, after which `length` tokens have been fed. Return its outputs by name."""
        arrays = {
            "inputs_embeds": text, "input_ids": text, "attention_mask": np.ones((1, length), np.int64),
            "position_ids": positions, "num_logits_to_keep": np.array(1),
        }  # fmt: skip
        given = {name: arrays[name].astype(TYPES[v.type]) for name, v in self.taken.items() if name in arrays} | extra
        feed = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for name, a in given.items()}
        return dict(zip(self.names, self.decoder.run_with_ort_values(self.names, {**feed, **cache}), strict=True))

    def _embed(self, inputs: dict[str, Any]) -> NDArray[Any]:
        """Return the decoder's input: ids (1, tokens), or embeddings (1, tokens, hidden) with pictures inserted."""
        ids: NDArray[Any] = inputs["input_ids"].astype(np.int64)  # (1, tokens)
        if self.embedding is None:
            return ids
        pictured = ids == self.image_token  # (1, tokens)
        embeds = embed(self.embedding, np.where(pictured, 0, ids))
        if self.vision is not None and "pixel_values" in inputs:
            taken = [*self.vision.get_inputs(), *self.vision.get_overridable_initializers()]
            given = {"grid_thw": inputs.get("image_grid_thw"), **inputs}  # Qwen2-VL's graph uses this name
            features = self.vision.run(None, {v.name: given[v.name].astype(TYPES[v.type]) for v in taken})[0]
            embeds[pictured] = features.reshape(-1, features.shape[-1])  # raises where the counts differ
        return embeds

    def _positions(self, inputs: dict[str, Any]) -> NDArray[Any]:
        """Return position ids of a prompt without padding: (1, tokens), or (3, 1, tokens) for three axes."""
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


def embed(embedding: Any, ids: NDArray[Any]) -> NDArray[Any]:
    """Return embeddings (1, tokens, hidden) of text. A graph that also inserts picture features gets none."""
    given = {value.name: empty(value.shape, TYPES[value.type])[:0] for value in embedding.get_inputs()}
    found: NDArray[Any] = embedding.run(None, given | {"input_ids": ids.astype(np.int64)})[0]
    return found


def _probability(values: dict[str, Any]) -> float:
    """Return P(unsafe) of one prompt, or NaN for a decoder without a gate."""
    return float(values["unsafe_probability"].numpy()[0]) if "unsafe_probability" in values else float("nan")


def session(path: Path | bytes, device: str, folder: Path | None = None) -> Any:
    """Return a session for one graph: a file, or a graph in memory whose weights are files in `folder`."""
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        onnxruntime.preload_dlls()
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": 0}))  # no reduced precision in float32
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(path, options, providers=providers)


def empty(shape: list[Any], dtype: Any, lengths: dict[str, int] | None = None) -> NDArray[Any]:
    """Return one cache input of one prompt before its first token. `lengths` maps names in `shape` to sizes."""
    sizes = (size if isinstance(size, int) else (lengths or {}).get(size, 0) for size in shape[1:])
    return np.zeros([1, *sizes], dtype)
