"""Runs ONNX graphs with onnxruntime and numpy. It shares no line with the code that made the expected answers."""

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from transformers import AutoProcessor, AutoTokenizer

KINDS: dict[str, Any] = {"float": np.float32, "int64": np.int64, "int32": np.int32, "bool": np.bool_}
# Settings in generation_config.json that change a greedy answer -> the value that changes nothing.
CHANGES: dict[str, Any] = {
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "sequence_bias": None,
    "min_length": 0, "min_new_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "exponential_decay_length_penalty": None,
    "guidance_scale": None, "encoder_repetition_penalty": 1.0,
}  # fmt: skip


class Tokenizer:
    """Writes prompts without pictures. It joins the parts of each message, unless the template needs parts."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)

    def apply_chat_template(self, chats: Any, processor_kwargs: Any, **options: Any) -> Any:
        joined = [{**said, "content": "".join(part["text"] for part in said["content"])} for said in chats[0]]
        text = self.tokenizer.apply_chat_template(joined, tokenize=False)
        chat = joined if joined[-1]["content"].strip() in text else chats[0]
        return self.tokenizer.apply_chat_template([chat], **options, **processor_kwargs)


class Model:
    """The graphs of a directory, which its config.json names. They have their own types, so it ignores `options`."""

    tensors = "np"

    def __init__(self, directory: Path, options: str, device: str) -> None:
        config, (settings, changes) = _read(directory / "config.json"), generation(directory)
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.startswith("cuda"):
            onnxruntime.preload_dlls()
            providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": 0}))  # no reduced precision in float32
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level = 3
        self.graphs = {
            role: onnxruntime.InferenceSession(directory / file, quiet, providers=providers)
            for role, file in config["sasa"]["graphs"].items()
        }
        pictures = "vision" in self.graphs
        self.processor = AutoProcessor.from_pretrained(directory) if pictures else Tokenizer(directory)
        self.lengths = config["sasa"].get("lengths", {})
        self.merge = config.get("vision_config", {}).get("spatial_merge_size")
        self.picture = config.get("image_token_id") or config.get("image_token_index")
        self.ends = np.atleast_1d(settings.get("eos_token_id", self.processor.tokenizer.eos_token_id)).tolist()
        self.penalty = settings.get("repetition_penalty") or 1.0
        self.about = {"provider": self.graphs["decoder"].get_providers()[0], "not_followed": changes}

    def judge(self, inputs: dict[str, Any]) -> float:
        """Return P(unsafe) of a prompt."""
        return float(self._prompt(inputs)[0]["unsafe_probability"][0])

    def answer(self, inputs: dict[str, Any], count: int) -> tuple[float, NDArray[Any], list[int]]:
        """Return P(unsafe) of a prompt, the first logits (vocabulary,), and at most `count` tokens of the answer."""
        values, place = self._prompt(inputs)
        found = float(values["unsafe_probability"][0]), values["logits"][0, -1].astype(np.float32)
        fed: list[int] = inputs["input_ids"][0].tolist()
        said: list[int] = []
        while True:
            logits, seen = values["logits"][0, -1].astype(np.float32), np.unique(fed)  # (vocabulary,), (tokens,)
            logits[seen] *= np.where(logits[seen] < 0, self.penalty, 1 / self.penalty)
            said.append(int(logits.argmax()))
            if said[-1] in self.ends or len(said) == count:
                return *found, said
            fed.append(said[-1])
            text = self._text({"input_ids": np.array([said[-1:]])})
            values = self._run(text, len(fed), np.full((3, 1, 1), place + len(said) - 1), values)

    def _prompt(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Return the decoder's outputs for a prompt, and the next position."""
        ids = inputs["input_ids"][0]  # (tokens,)
        blocks: list[NDArray[Any]] = []  # (3, tokens) each
        start, grids = 0, iter(inputs.get("image_grid_thw", ()))
        for pictured, run in groupby(ids == self.picture):
            count = len(list(run))
            sizes = next(grids) // [1, self.merge, self.merge] if pictured and self.merge else None
            block = np.tile(np.arange(count), (3, 1))
            if sizes is not None and self._axes() == 3:  # (frame, row, column) of each token of a picture
                block = np.stack(np.unravel_index(np.arange(count), sizes))
            blocks.append(block + start)
            start = int(blocks[-1].max()) + 1
        return self._run(self._text(inputs), len(ids), np.concatenate(blocks, axis=1)[:, None], {}, inputs), start

    def _axes(self) -> int:
        return next((len(v.shape) for v in self.graphs["decoder"].get_inputs() if v.name == "position_ids"), 2)

    def _text(self, inputs: dict[str, Any]) -> NDArray[Any]:
        """Return the decoder's input: ids (1, tokens), or embeddings (1, tokens, width) with pictures inserted."""
        ids: NDArray[Any] = inputs["input_ids"].astype(np.int64)  # (1, tokens)
        if "embedding" not in self.graphs:
            return ids
        pictured = ids == (-1 if self.picture is None else self.picture)  # (1, tokens)
        words = {"input_ids": np.where(pictured, 0, ids)}
        for value in self.graphs["embedding"].get_inputs():  # no features to merge
            if value.name not in words:
                words[value.name] = np.zeros(
                    [0, *(n if isinstance(n, int) else 1 for n in value.shape[1:])], kind(value)
                )
        text: NDArray[Any] = self.graphs["embedding"].run(None, words)[0]
        if pictured.any() and "pixel_values" in inputs:
            vision = self.graphs["vision"]
            named = {"grid_thw": inputs.get("image_grid_thw"), **inputs}
            taken = [*vision.get_inputs(), *vision.get_overridable_initializers()]
            features = vision.run(None, {v.name: named[v.name].astype(kind(v)) for v in taken})[0]
            text[pictured] = features.reshape(-1, text.shape[-1])
        return text

    def _run(
        self, text: Any, length: int, places: Any, before: dict[str, Any], more: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the outputs of one call. The cache comes from the outputs `before`; places are (3, 1, tokens)."""
        decoder, feed = self.graphs["decoder"], dict[str, Any]()
        known = {
            "input_ids": text, "inputs_embeds": text, "attention_mask": np.ones((1, length)),
            "position_ids": places if self._axes() == 3 else places[0], "num_logits_to_keep": np.array(1),
        }  # fmt: skip
        for value in decoder.get_inputs():
            held = before.get(re.sub("^past(_key_values)?", "present", value.name))
            if value.name in known:
                feed[value.name] = known[value.name].astype(kind(value))
            else:
                sizes = (size if isinstance(size, int) else self.lengths.get(size, 0) for size in value.shape[1:])
                feed[value.name] = np.zeros([1, *sizes], kind(value)) if held is None else held
        for value in decoder.get_overridable_initializers():
            if more and value.name in more:
                feed[value.name] = more[value.name].astype(kind(value))
        names = [value.name for value in decoder.get_outputs()]
        return dict(zip(names, decoder.run(names, feed), strict=True))


def kind(value: Any) -> Any:
    """Return the numpy type of an input."""
    return KINDS.get(value.type[len("tensor(") : -1], np.float16)


def generation(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """Return a directory's generation settings, and the names of those that change an answer but are ignored here."""
    settings = {
        **_read(directory / "genai_config.json").get("model", {}),
        **_read(directory / "generation_config.json"),
    }
    return settings, sorted(name for name, idle in CHANGES.items() if settings.get(name, idle) not in (idle, None))


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
