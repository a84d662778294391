"""An ONNX directory's graphs, driven with onnxruntime and numpy as any runtime would drive them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from transformers import AutoProcessor, AutoTokenizer, RepetitionPenaltyLogitsProcessor

TYPES: dict[str, Any] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}  # fmt: skip
# What generation_config.json may hold that changes a greedy answer, and the value that changes nothing.
CHANGES: dict[str, Any] = {
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "sequence_bias": None,
    "min_length": 0, "min_new_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "exponential_decay_length_penalty": None,
    "guidance_scale": None, "encoder_repetition_penalty": 1.0,
}  # fmt: skip


class Texts:
    """A tokenizer, asked as a processor is: what is said is a list of parts, all of them text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.chat_template = tokenizer, tokenizer.chat_template
        chat = [{"role": "user", "content": "word"}]  # of which some templates take parts alone
        self.joins = self.chat_template is None or "word" in tokenizer.apply_chat_template(chat, tokenize=False)

    def apply_chat_template(
        self, chat: Any, *, tokenize: bool = False, processor_kwargs: Any = None, **rest: Any
    ) -> Any:
        chat = _joined(chat) if self.joins else chat
        return self.tokenizer.apply_chat_template(chat, tokenize=tokenize, **rest, **(processor_kwargs or {}))


def processor_of(directory: Path, *, pictures: bool) -> Any:
    """What writes prompts for the graphs of a directory, which read pictures or text alone."""
    if pictures:
        return AutoProcessor.from_pretrained(directory, trust_remote_code=False)
    return Texts(AutoTokenizer.from_pretrained(directory, trust_remote_code=False, padding_side="left"))


def _joined(chat: Any) -> Any:
    """A chat, or several, with each message's parts joined."""
    if isinstance(chat, list):
        return [_joined(part) for part in chat]
    said = chat["content"]
    return {**chat, "content": said if isinstance(said, str) else "".join(part["text"] for part in said)}


class Model:
    """The graphs of a directory, and what its configuration says about them.

    Args:
        directory: the ONNX directory.
        suffix: what the names of its graphs end with before `.onnx`, unless config.json names their files.
        device: "cuda", or any other for the CPU.
        given: in the place of what config.json says under `sasa`: `graphs`, their files by role (decoder, embedding,
            vision), and `lengths` of dimensions of the cache that go by names.
        decoder: a session that runs in the decoder's place.
    """

    tensors = "np"

    def __init__(
        self, directory: Path, suffix: str, device: str, given: dict[str, Any] | None = None, decoder: Any = None
    ) -> None:
        self.config = read_json(directory / "config.json")
        names = {"vision": "vision_encoder", "embedding": "embed_tokens", "decoder": "decoder_model_merged"}
        usual = {role: f"onnx/{name}{suffix}.onnx" for role, name in names.items()}
        sasa = given or self.config.get("sasa", {})
        graphs, self.lengths = sasa.get("graphs", usual), sasa.get("lengths", {})
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
        genai = read_json(directory / "genai_config.json").get("model", {})
        settings = {**genai, **read_json(directory / "generation_config.json")}
        ends = settings.get("eos_token_id", self.processor.tokenizer.eos_token_id)
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.penalise = RepetitionPenaltyLogitsProcessor(float(settings.get("repetition_penalty") or 1.0))
        changes = sorted(name for name, idle in CHANGES.items() if settings.get(name, idle) not in (idle, None))
        self.about: dict[str, Any] = {"provider": self.decoder.get_providers()[0], "not_followed": changes}

    def answer(self, inputs: dict[str, Any], count: int) -> tuple[float, NDArray[Any], list[int]]:
        """The greedy answer to one prompt: P(unsafe), the first logits (vocabulary,), and at most `count` tokens."""
        prompt, positions = inputs["input_ids"][0].tolist(), self._positions(inputs)
        values = self.prompt(inputs)
        first = logits = _first(values)
        answer, probability = list[int](), _probability(values)
        position = positions.max() + 1
        while True:
            seen, scores = torch.tensor([prompt + answer]), torch.from_numpy(logits)[None]  # (1, ...)
            answer.append(int(self.penalise(seen, scores).argmax()))
            if answer[-1] in self.ends or len(answer) == count:
                return probability, first, answer
            text = self._embed({"input_ids": np.array([answer[-1:]], np.int64)})  # (1, 1), or (1, 1, hidden)
            at = np.full_like(positions[..., :1], position + len(answer) - 1)
            values = self._call(text, len(prompt) + len(answer), at, self.after(values), {})
            logits = _first(values)

    def judge(self, inputs: dict[str, Any], cuts: Sequence[int] = ()) -> float:
        """P(unsafe) of one prompt alone, fed whole, or in several calls."""
        return _probability(self.prompt(inputs, cuts))

    def prompt(self, inputs: dict[str, Any], cuts: Sequence[int] = ()) -> dict[str, Any]:
        """A whole prompt on an empty cache, the calls after the first beginning at `cuts`: what the last one gave."""
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
        """The cache that a call gave, as the next one takes it."""
        pairs = ((name, re.sub(r"^past(_key_values)?", "present", name)) for name in self.taken)
        return {name: values[present] for name, present in pairs if present in values}

    def _call(
        self, text: NDArray[Any], length: int, positions: NDArray[Any], cache: dict[str, Any], extra: dict[str, Any]
    ) -> dict[str, Any]:
        """One call, after which `length` tokens were fed: what it put out, by name."""
        arrays = {
            "inputs_embeds": text, "input_ids": text, "attention_mask": np.ones((1, length), np.int64),
            "position_ids": positions, "num_logits_to_keep": np.array(1),
        }  # fmt: skip
        given = {name: arrays[name].astype(TYPES[v.type]) for name, v in self.taken.items() if name in arrays} | extra
        feed = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for name, a in given.items()}
        return dict(zip(self.names, self.decoder.run_with_ort_values(self.names, {**feed, **cache}), strict=True))

    def _embed(self, inputs: dict[str, Any]) -> NDArray[Any]:
        """A prompt as the decoder reads it: ids (1, tokens), or embeddings (1, tokens, hidden), pictures in place."""
        ids: NDArray[Any] = inputs["input_ids"].astype(np.int64)  # (1, tokens)
        if self.embedding is None:
            return ids
        pictured = ids == self.image_token  # (1, tokens)
        embeds = embed(self.embedding, np.where(pictured, 0, ids))
        if self.vision is not None and "pixel_values" in inputs:
            taken = [*self.vision.get_inputs(), *self.vision.get_overridable_initializers()]
            given = {"grid_thw": inputs.get("image_grid_thw"), **inputs}  # by the name that Qwen2-VL's graph has
            features = self.vision.run(None, {v.name: given[v.name].astype(TYPES[v.type]) for v in taken})[0]
            embeds[pictured] = features.reshape(-1, features.shape[-1])  # raises where numbers differ
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


def embed(embedding: Any, ids: NDArray[Any]) -> NDArray[Any]:
    """Embeddings (1, tokens, hidden) of text. A graph that takes features of pictures too gets none."""
    given = {
        value.name: ids.astype(TYPES[value.type])
        if value.name == "input_ids"
        else empty(value.shape, TYPES[value.type])[:0]
        for value in embedding.get_inputs()
    }
    found: NDArray[Any] = embedding.run(None, given)[0]
    return found


def _first(values: dict[str, Any]) -> NDArray[Any]:
    """The last token's logits (vocabulary,), float32."""
    logits: NDArray[Any] = values["logits"].numpy()[0, -1].astype(np.float32)
    return logits


def _probability(values: dict[str, Any]) -> float:
    """P(unsafe) of one prompt; NaN of a decoder that judges none."""
    return float(values["unsafe_probability"].numpy()[0]) if "unsafe_probability" in values else float("nan")


def session(path: Path | bytes, device: str, folder: Path | None = None) -> Any:
    """One graph, ready to run: a file, or one in memory whose weights lie in files of a folder."""
    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        onnxruntime.preload_dlls()
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": 0}))  # float32 is to mean float32
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(path, options, providers=providers)


def empty(shape: list[Any], dtype: Any, lengths: dict[str, int] | None = None) -> NDArray[Any]:
    """What one input of the cache holds of one prompt before its first token, whose lengths go by names in `shape`."""
    return np.zeros(
        [1, *(size if isinstance(size, int) else (lengths or {}).get(size, 0) for size in shape[1:])], dtype
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty where there is none."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
