"""Ask a guarded ONNX directory about a picture, with plain onnxruntime.

    python onnxruntime_chat.py patched/ "Follow the instruction shown in the image." picture.png

Nothing here knows of the guard: the graph judges the prompt, and a refused one makes it say the refusal. The cache
stays where the decoder runs, on the GPU where onnxruntime has one. For families with plain position ids (LLaVA,
LLaVA-NeXT, InternVL, Mistral 3, SmolVLM, Idefics3, Gemma 3, LFM2-VL).
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image
from transformers import AutoProcessor

TYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(bool)": np.bool_,
}  # fmt: skip


class Chat:
    """The three graphs of a directory; `suffix` picks a type, such as _fp16 or _q4."""

    def __init__(self, directory: Path, suffix: str = "") -> None:
        providers = ["CPUExecutionProvider"]
        if shutil.which("nvidia-smi"):
            onnxruntime.preload_dlls()
            providers.insert(0, "CUDAExecutionProvider")
        self.vision, self.embedding, self.decoder = (
            onnxruntime.InferenceSession(directory / "onnx" / f"{name}{suffix}.onnx", providers=providers)
            for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
        )
        self.device = "cuda" if "CUDAExecutionProvider" in self.decoder.get_providers() else "cpu"
        self.processor = AutoProcessor.from_pretrained(directory)
        config = json.loads((directory / "config.json").read_text())
        self.image_token = config.get("image_token_id", config.get("image_token_index"))
        ends = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
        self.ends = set(ends if isinstance(ends, list) else [ends])

    def answer(self, prompt: str, image: Image.Image | None = None, max_tokens: int = 200) -> Iterator[str]:
        """The answer, piece by piece as it is said."""
        said: list[int] = []
        text = shown = ""
        for token in self.tokens(prompt, image, max_tokens):
            said.append(token)
            text = self.processor.tokenizer.decode(said, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # the middle of a character of several tokens
                yield text[len(shown) :]
                shown = text
        yield text[len(shown) :]

    def tokens(self, prompt: str, image: Image.Image | None = None, max_tokens: int = 200) -> Iterator[int]:
        """The greedy token ids of the answer, the end token last."""
        embeds, extra = self.embed(prompt, image)  # (1, tokens, hidden)
        cache = {
            value.name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros([1, *(size if isinstance(size, int) else 0 for size in value.shape[1:])], TYPES[value.type]),
                self.device,
            )
            for value in self.decoder.get_inputs()
            if value.name.startswith("past_")
        }
        length = 0
        for _ in range(max_tokens):
            positions = np.arange(length, length + embeds.shape[1])[None]  # (1, tokens)
            length += embeds.shape[1]
            mask = np.ones((1, length), np.int64)  # (1, past + tokens)
            feed = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, **extra}
            logits, cache = self.step(feed, cache)
            token = int(logits[0, -1].argmax())
            yield token
            if token in self.ends:
                return
            embeds, extra = self.embedding.run(None, {"input_ids": np.array([[token]])})[0], {}  # (1, 1, hidden)

    def embed(self, prompt: str, image: Image.Image | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A prompt with its picture's features in place, (1, tokens, hidden), and what else the decoder takes."""
        picture = [] if image is None else [{"type": "image"}]
        chat = [{"role": "user", "content": [*picture, {"type": "text", "text": prompt}]}]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        images = {} if image is None else {"images": [image]}
        inputs = dict(self.processor(text=[text], return_tensors="np", **images))
        embeds = self.embedding.run(None, {"input_ids": inputs["input_ids"]})[0]
        if image is not None:
            feed = {value.name: inputs[value.name].astype(TYPES[value.type]) for value in self.vision.get_inputs()}
            features = self.vision.run(None, feed)[0]
            embeds[inputs["input_ids"] == self.image_token] = features.reshape(-1, features.shape[-1])
        optional = {value.name for value in self.decoder.get_overridable_initializers()}
        return embeds, {name: inputs[name] for name in optional if name in inputs}

    def step(self, feed: dict[str, Any], cache: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """One call of the decoder: logits (1, 1, vocabulary) and the grown cache, which never leaves the device."""
        binding = self.decoder.io_binding()
        for name, value in feed.items():
            binding.bind_cpu_input(name, value)
        for name, value in cache.items():
            binding.bind_ortvalue_input(name, value)
        names = [value.name for value in self.decoder.get_outputs()]
        for name in names:
            binding.bind_output(name, self.device if name.startswith("present") else "cpu")
        self.decoder.run_with_iobinding(binding)
        values = dict(zip(names, binding.get_outputs(), strict=True))
        present = (value for name, value in values.items() if name.startswith("present"))
        return values["logits"].numpy(), dict(zip(cache, present, strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ask a guarded ONNX directory about a picture.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("image", type=Path, nargs="?")
    parser.add_argument("--suffix", default="", help="_fp16, _int8, _q4: another type of the same graphs")
    given = parser.parse_args()
    for piece in Chat(given.directory, given.suffix).answer(given.prompt, given.image and Image.open(given.image)):
        print(piece, end="", flush=True)
    print()
