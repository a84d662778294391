"""Graphs in the layout of transformers.js, patched, in the stock transformers.js: texts and pictures."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny
from cli_steps import flags, succeeds, write_probe
from test_foreign_graphs import PROMPTS, REFUSAL, ROOT

from sasa_export.graph.rewrite import LaneSettings
from sasa_export.probe import bundled

WEB = ROOT / "transformers_js" / "smol-llava"
TOKENS = 12
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WEB.exists(), reason="NO GRAPHS OF OTHERS: make foreign makes them"),
]


@pytest.mark.parametrize("kind", ["fp32", "q4"])
def test_answers_and_refusals(kind: str, node: Any, place: Path) -> None:
    """What is refused gets the refusal, and every other answer is the unpatched graphs'."""
    fitted = bundled.read("smol-llava", LaneSettings(24, 28), (), "auto")
    assert fitted is not None
    probe = write_probe(place / "probe.safetensors", *fitted.probes["projected"])
    words = flags(WEB, place / "patched", "--link", probe=probe, onnx_file=kind, verify="files", refusal=REFUSAL)
    succeeds(*words)
    (place / "texts.jsonl").write_text("".join(json.dumps({"image": None, "prompt": text}) + "\n" for text in PROMPTS))
    succeeds("score", str(place / "patched"), str(place / "texts.jsonl"), "--out", str(place / "scored.jsonl"))
    scored = [json.loads(line)["probability"] for line in (place / "scored.jsonl").read_text().splitlines()]
    succeeds(*words, "--force", "--threshold", str(sum(sorted(scored)[1:3]) / 2))  # a probe of float32 is off in 4 bits
    sasa = json.loads((place / "patched" / "config.json").read_text())
    shutil.copytree(WEB, place / "plain", copy_function=lambda source, copy: os.link(os.path.realpath(source), copy))
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
    """Make a directory what transformers.js expects: a template with the tokenizer's settings, no class token to count
    among a picture's tokens, and numbers as sizes of the cache, but for its length."""
    tokenizer = {"chat_template": (WEB / "chat_template.jinja").read_text()}
    processor = {"num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"}
    for name, more in (("tokenizer_config.json", tokenizer), ("processor_config.json", processor)):
        settings = json.loads((WEB / name).read_text())
        (directory / name).unlink()
        (directory / name).write_text(json.dumps(settings | more))
    for path in directory.glob("onnx/decoder_model_merged*.onnx"):
        graph = onnx.load(path, load_external_data=False)
        for value in (value for value in graph.graph.input if value.name.startswith("past_key_values.")):
            value.type.tensor_type.shape.dim[3].dim_value = 64
        path.unlink()
        onnx.save(graph, path)
