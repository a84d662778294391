"""Other families than LLaVA in the stock transformers.js under Node: what torch says of the same inputs.

Its processors resize pictures in their own way, so torch is given what they made of them.
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

SCRIPT = Path(__file__).parent / "javascript" / "ask.mjs"
PACKAGE = Path(__file__).parents[1] / "examples" / "transformers_js" / "package.json"
TOKENS = 12
PROMPTS = ("what is in this picture", "tell me how to cook rice", "why is the old house red", "list three ideas")
CLASSES = {
    "smolvlm": "SmolVLMForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
FAMILIES = [pytest.param(family, marks=pytest.mark.xdist_group(f"onnx-{family}")) for family in CLASSES]


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`node(words...)`: what the script prints, with the package of the example installed."""
    program, npm = shutil.which("node"), shutil.which("npm")
    if program is None or npm is None:
        pytest.skip("NODE IS NOT INSTALLED: that transformers.js refuses as torch does was NOT tested")
    place = tmp_path_factory.mktemp("javascript")
    shutil.copyfile(PACKAGE, place / "package.json")
    shutil.copyfile(SCRIPT, place / SCRIPT.name)
    install = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline"]
    subprocess.run(install, cwd=place, check=True, capture_output=True)

    def run(*words: str) -> Any:
        result = subprocess.run([program, SCRIPT.name, *words], cwd=place, check=False, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        return json.loads(result.stdout.strip().splitlines()[-1])

    return run


def as_on_a_hub(directory: Path, copy: Path) -> Path:
    """A copy with what the tiny models lack: a tokenizer that adds no token by itself, Qwen's own processor class."""
    shutil.copytree(directory, copy)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    (copy / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    for path in copy.glob("*.json"):
        path.write_text(path.read_text().replace("PaddleOCRVLProcessor", "Qwen2_5_VLProcessor"))
    return copy


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_js_says_what_torch_says(
    family: str, split: Any, exported: Any, node: Callable[..., Any], tmp_path: Path
) -> None:
    guard = split(family)
    as_on_a_hub(exported(guard.directory), tmp_path / "model")
    tiny.random_image(3).resize((tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)).save(tmp_path / "picture.png")
    words = (str(tmp_path), "model", CLASSES[family], str(tmp_path / "picture.png"), str(TOKENS), *PROMPTS)
    entries = node(*words)
    assert len(entries) == 2 * len(PROMPTS)
    fed = [inputs_of(entry, guard) for entry in entries]
    with torch.no_grad():
        scores = [guard.model(**inputs).unsafe_probability.item() for inputs in fed]
        answers = [guard.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0] for inputs in fed]
    threshold = guard.model.config.sasa["threshold"]
    for entry, inputs, score, answer in zip(entries, fed, scores, answers, strict=True):
        if abs(score - threshold) < 1e-4:
            continue
        wanted = answer[inputs["input_ids"].shape[1] :].tolist()
        assert (entry["tokens"] == guard.refusal[:TOKENS]) == (score >= threshold)
        if family == "qwen2_5_vl" and "pixel_values" not in inputs and score < threshold:
            # It counts the positions of an answer to text alone as if the prompt were as long again.
            wanted, entry["tokens"] = wanted[:1], entry["tokens"][:1]
        assert entry["tokens"] == wanted


@pytest.mark.xdist_group("onnx-smolvlm")
@torch.no_grad()
def test_transformers_js_judges_every_token(
    guard: Any, exported: Any, node: Callable[..., Any], tmp_path: Path
) -> None:
    """An answer ends in the refusal where it does in torch."""
    guarded = guard("smolvlm", gate="every-token")
    as_on_a_hub(exported(guarded.directory), tmp_path / "model")
    tiny.random_image(3).resize((tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)).save(tmp_path / "picture.png")
    words = (str(tmp_path), "model", CLASSES["smolvlm"], str(tmp_path / "picture.png"), str(TOKENS), *PROMPTS)
    begun = set()
    for entry in node(*words):
        inputs = inputs_of(entry, guarded)
        length = inputs["input_ids"].shape[1]
        answer = guarded.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, length:].tolist()
        assert entry["tokens"] == answer
        begun |= {at for at in range(TOKENS) if answer[at:] and answer[at:] == guarded.refusal[: len(answer) - at]}
    assert begun - {0}, "no answer turned into the refusal on its way"


def inputs_of(entry: Any, guard: Any) -> dict[str, torch.Tensor]:
    """What transformers.js fed, as torch's model takes it."""
    inputs = {name: torch.tensor(value["data"]).reshape(value["dims"]) for name, value in entry["inputs"].items()}
    taken = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask", "image_grid_thw")
    inputs = {
        name: value.float() if name == "pixel_values" else value.long()
        for name, value in inputs.items()
        if name in taken
    }
    pictured = (inputs["input_ids"] == guard.model.config.image_token_id).long()  # (1, tokens)
    if guard.family == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = pictured
    if guard.family == "gemma3":  # it does not tell the decoder which tokens are a picture's
        inputs["token_type_ids"] = torch.zeros_like(pictured)
    return inputs
