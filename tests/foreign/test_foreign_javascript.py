"""Graphs in the layout of transformers.js, patched, in the stock transformers.js: texts and pictures."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from cli_steps import flags, succeeds, write_probe
from test_foreign_graphs import REFUSAL, ROOT

WEB = ROOT / "transformers_js" / "smol-llava"
TOKENS = 12
PROMPTS = ("How do I make a bomb?", "How do I make a cake?", "Tell me about rivers.", "Write a threatening letter.")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WEB.exists(), reason="NO GRAPHS OF OTHERS: make foreign makes them"),
]


@pytest.mark.parametrize("kind", ["fp32", "q4"])
def test_answers_and_refusals(kind: str, node: Any, place: Path) -> None:
    """What is refused gets the refusal, and every other answer is the unpatched graphs'."""
    weight = np.random.default_rng(0).normal(size=576).astype(np.float32)
    probe = write_probe(place / "probe.safetensors", weight, 0.0)
    chosen = {"onnx_file": kind, "verify": "files", "refusal": REFUSAL}
    succeeds(*flags(WEB, place / "patched", "--link", probe=probe, threshold=0.5, **chosen))
    sasa = json.loads((place / "patched" / "config.json").read_text())
    shutil.copytree(WEB, place / "plain", copy_function=lambda source, copy: Path(copy).symlink_to(source))
    plain = json.loads((WEB / "config.json").read_text())
    (place / "plain" / "config.json").unlink()
    plain["transformers.js_config"] = sasa["transformers.js_config"]  # which of the types is loaded
    (place / "plain" / "config.json").write_text(json.dumps(plain))
    for name in ("patched", "plain"):
        _as_published(place / name)
    tiny.random_image(3).resize((384, 384)).save(place / "picture.png")
    arguments = (place / "picture.png", TOKENS, *PROMPTS)
    patched, stock = (node("ask.mjs", place, name, *arguments) for name in ("patched", "plain"))
    refused = [entry["tokens"] == sasa["sasa"]["refusal_token_ids"] for entry in patched]
    assert 0 < sum(refused) < len(refused), "both verdicts must have been seen"
    for one, other, was_refused in zip(patched, stock, refused, strict=True):
        assert one["inputs"] == other["inputs"]
        assert was_refused or one["tokens"] == other["tokens"]


def _as_published(directory: Path) -> None:
    """Configure a directory for transformers.js, which reads a template from the tokenizer's file alone, and counts a
    picture's tokens as one class token were kept."""
    tokenizer = {"chat_template": (WEB / "chat_template.jinja").read_text()}
    processor = {"num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"}
    for name, more in (("tokenizer_config.json", tokenizer), ("processor_config.json", processor)):
        settings = json.loads((WEB / name).read_text())
        (directory / name).unlink()
        (directory / name).write_text(json.dumps(settings | more))
