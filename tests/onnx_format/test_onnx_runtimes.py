"""Exported directories in runtimes that know nothing of the guard: they answer and refuse as torch does.

Plain onnxruntime and the stock transformers.js under Node, through the examples, and other families in transformers.js.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from onnx_runner import JAVASCRIPT
from transformers import AutoProcessor

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
TOKENS = 12
PROMPTS = ("what is in this picture", "tell me how to cook rice", "why is the old house red", "list three ideas")
FAMILIES = [pytest.param(family, marks=pytest.mark.xdist_group(f"onnx-{family}")) for family in JAVASCRIPT]
# What a tiny model's stand-in of a processor is called in a published checkpoint.
PROCESSORS = {
    "qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor",
    "mistral3": "PixtralProcessor", "lfm2_vl": "Lfm2VlProcessor",
}  # fmt: skip
# The settings of LFM2-VL's own image processor, for patches like those of the tiny model's stand-in.
LFM2_IMAGES = {
    "image_processor_type": "Lfm2VlImageProcessor", "encoder_patch_size": tiny.PATCH, "downsample_factor": 1,
    "do_resize": False, "do_image_splitting": False, "min_image_tokens": 1, "max_image_tokens": 20,
}  # fmt: skip
pytestmark = pytest.mark.slow  # an export a family


@pytest.fixture
def hub(exported: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A guard's ONNX directory with what tiny models lack: a tokenizer that adds no token, the processor's class."""

    def copied(guard: Any, dtype: str = "float32") -> Path:
        copy = shutil.copytree(exported(guard.directory, dtype=dtype), tmp_path / "model")
        tokenizer = json.loads((copy / "tokenizer.json").read_text())
        (copy / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
        for path in copy.glob("*.json"):
            stand_in = r"PaddleOCRVLProcessor|LightOnOcrProcessor|\bPatches\b"
            path.write_text(re.sub(stand_in, PROCESSORS.get(guard.family, ""), path.read_text()))
        if guard.family == "mistral3":
            tokens = {f"image{kind}_token": f"[IMG{kind.upper()}]" for kind in ("", "_break", "_end")}
            processor = json.loads((copy / "processor_config.json").read_text())
            (copy / "processor_config.json").write_text(json.dumps({**processor, **tokens}))
        if guard.family == "lfm2_vl":
            images = json.loads((copy / "preprocessor_config.json").read_text())
            (copy / "preprocessor_config.json").write_text(json.dumps({**images, **LFM2_IMAGES}))
        return copy

    return copied


def picture(seed: int) -> Any:
    """One that no processor has to resize, which each does in its own way."""
    return tiny.random_image(seed).resize((tiny.IMAGE_SIZE, tiny.IMAGE_SIZE))


def pictured(processor: Any, seed: int) -> tuple[str, Any, Any]:
    """A prompt, the picture before it, and both as inputs."""
    prompt, image = PROMPTS[seed % len(PROMPTS)], picture(seed)
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return prompt, image, processor(images=[image], text=[text], return_tensors="pt")


@torch.no_grad()
def answer(guard: Any, inputs: dict[str, Any]) -> list[int]:
    """Torch's greedy answer."""
    found = guard.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)  # (1, tokens)
    return found[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.xdist_group("onnx-llava")
def test_the_examples_say_what_torch_says(
    split: Any, hub: Any, node: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from onnxruntime_chat import Chat

    guard = split("llava")
    directory = hub(guard)
    chat = Chat(directory)
    cases: dict[bool, tuple[str, Any, list[int]]] = {}  # one that is refused, and one that is not
    for seed in range(20):
        prompt, image, inputs = pictured(chat.processor, seed)
        wanted = answer(guard, inputs)
        cases.setdefault(wanted == guard.refusal[:TOKENS], (prompt, image, wanted))
    assert len(cases) == 2, "both verdicts must have been seen"
    for prompt, image, wanted in cases.values():
        said = chat.processor.tokenizer.decode(wanted, skip_special_tokens=True)
        assert list(chat.tokens(prompt, image, TOKENS)) == wanted
        assert "".join(chat.answer(prompt, image, TOKENS)) == said
        image.save(tmp_path / "picture.png")
        arguments = (directory, prompt, tmp_path / "picture.png", "--json", "--max-new-tokens", TOKENS)
        assert node("chat.mjs", *arguments) == {"ids": wanted, "text": said}


@pytest.mark.xdist_group("onnx-llava")
def test_transformers_js_loads_the_type_that_lies_there(split: Any, hub: Any, node: Any, tmp_path: Path) -> None:
    """Nobody names a type, and there are only int8 graphs: prompts far from the threshold keep their verdicts."""
    guard = split("llava")
    directory = hub(guard, "int8")
    assert len(list(directory.glob("onnx/*_int8.onnx"))) == len(list(directory.glob("onnx/*.onnx"))) == 4
    processor = AutoProcessor.from_pretrained(directory)
    cases = []
    for seed in range(20):
        prompt, image, inputs = pictured(processor, seed)
        with torch.no_grad():
            output = guard.model(**inputs)
        cases.append((float(output.unsafe_probability[0]), prompt, image))
    cases.sort(key=lambda case: case[0])
    threshold = guard.model.config.sasa["threshold"]
    assert cases[0][0] < threshold - 0.05 and cases[-1][0] > threshold + 0.05
    for probability, prompt, image in (cases[0], cases[-1]):
        image.save(tmp_path / "picture.png")
        arguments = (directory, prompt, tmp_path / "picture.png", "--json", "--max-new-tokens", TOKENS)
        assert (node("chat.mjs", *arguments)["ids"] == guard.refusal[:TOKENS]) == (probability > threshold)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_js_says_what_torch_says(family: str, split: Any, hub: Any, node: Any, tmp_path: Path) -> None:
    guard = split(family)
    directory = hub(guard)
    picture(3).save(tmp_path / "picture.png")
    entries = node("ask.mjs", tmp_path, directory.name, tmp_path / "picture.png", TOKENS, *PROMPTS)
    assert len(entries) == 2 * len(PROMPTS)
    for entry in entries:
        inputs = fed(entry, guard)
        said, wanted = entry["tokens"], answer(guard, inputs)
        if family.startswith("qwen") and "pixel_values" not in inputs and wanted != guard.refusal[:TOKENS]:
            # It counts the positions of an answer to text alone as if the prompt were as long again.
            said, wanted = said[:1], wanted[:1]
        assert said == wanted


def fed(entry: Any, guard: Any) -> dict[str, torch.Tensor]:
    """What transformers.js fed, as torch's model takes it."""
    inputs = {}
    names = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask", "image_grid_thw", "spatial_shapes")
    for name in names:
        if name in entry["inputs"]:
            kind = torch.float32 if name == "pixel_values" else torch.int64
            value = entry["inputs"][name]
            inputs[name] = torch.tensor(value["data"], dtype=kind).reshape(value["dims"])
    pictured = (inputs["input_ids"] == guard.model.config.image_token_id).long()  # (1, tokens)
    if guard.family.startswith("qwen"):
        inputs["mm_token_type_ids"] = pictured
    if guard.family == "mistral3" and "pixel_values" in inputs:  # of one size, so that it need not tell
        inputs["image_sizes"] = torch.tensor([inputs["pixel_values"].shape[-2:]])
    if guard.family == "gemma3":  # it does not tell the decoder which tokens are a picture's
        inputs["token_type_ids"] = torch.zeros_like(pictured)
    return inputs
