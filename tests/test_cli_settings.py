"""The command line and what it is told: calibration prompts, a probe, options."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_steps import Tiny, fails, flags, invoke, write_probe
from safetensors.numpy import save_file

# ------------------------------------------------------------------------------------------ calibration


def record(**fields: Any) -> str:
    return json.dumps({"image": None, "prompt": "the old house", "label": 0, **fields})


def ten_lines() -> list[str]:
    return [record(label=number % 2, prompt=f"the old house {number}") for number in range(10)]


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"image": null, "prompt": "a", "label": ', "line 7 is not valid JSON"),
        ("harmless prompt", "line 7 is not valid JSON"),
        (record(label="x"), "line 7 has the label 'x'; it must be 0 (harmless) or 1 (harmful)"),
        (record(label=2), "line 7 has the label 2"),
        (record(label=1.0), "line 7 has the label 1.0"),
        (record(label=None), "line 7 has the label None"),
        (record(prompt=3), 'line 7 has no "prompt" string'),
        (record(prompt=" "), "line 7 has an empty prompt and no image"),
        (record(image=3), 'line 7 has an "image" that is neither a path nor null'),
        (record(image="none.png"), "line 7 names the image"),
        (record(image="x" * 300), "line 7 names the image"),
        ("[]", 'line 7 has no "prompt" string'),
        ("[" * 100_000, "line 7"),
        ("1" * 5000, "line 7"),
    ],
    ids=[
        "cut off",
        "no JSON",
        "label x",
        "label 2",
        "label 1.0",
        "label null",
        "prompt 3",
        "blank prompt",
        "image 3",
        "no image",
        "long name",
        "a list",
        "deep",
        "long number",
    ],
)
def test_a_bad_calibration_line(llava: Path, tmp_path: Path, place: Path, line: str, said: str) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = ten_lines()
    lines[6] = line
    path.write_text("\n".join(lines))
    message = fails(*flags(llava, place / "out", calibration=path))
    assert f"{path}, {said}" in message
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    "lines, said",
    [
        ([], "fewer than 5 harmful prompts"),
        (["", "  "], "fewer than 5 harmful prompts"),
        ([record()] * 20, "fewer than 5 harmful prompts (label 1), and a probe needs both classes"),
        ([record(label=1)] * 20, "fewer than 5 harmless prompts (label 0), and a probe needs both classes"),
    ],
    ids=["empty", "blank", "harmless alone", "harmful alone"],
)
def test_a_calibration_file_without_both_classes(
    llava: Path, tmp_path: Path, place: Path, lines: list[str], said: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines))
    assert said in fails(*flags(llava, place / "out", calibration=path))
    assert not list(place.iterdir())


def test_a_calibration_file_that_is_none(llava: Path, tmp_path: Path, place: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    for path, said in (
        (tmp_path / "none.jsonl", "there is no calibration file"),
        (tmp_path, "cannot be read"),
        (binary, "cannot be read"),
    ):
        assert said in fails(*flags(llava, place / "out", calibration=path))
        assert not list(place.iterdir())


def test_an_image_that_is_none(llava: Path, tmp_path: Path, place: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join([*ten_lines(), record(image="broken.png")]))
    message = fails(*flags(llava, place / "out", calibration=path))
    assert f"line 11 names the image {tmp_path / 'broken.png'}, which cannot be read" in message
    assert not list(place.iterdir())


def test_a_prompt_that_no_tokenizer_takes(llava: Path, tmp_path: Path, place: Path) -> None:
    """JSON can spell half of a surrogate pair, which is no text."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join([*ten_lines(), '{"image": null, "prompt": "\\ud800", "label": 1}']))
    assert "line 11" in fails(*flags(llava, place / "out", calibration=path))
    assert not list(place.iterdir())


def test_all_prompts_in_one_group(llava: Path, tmp_path: Path, place: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(record(label=number % 2, group="all") for number in range(20)))
    assert "group" in fails(*flags(llava, place / "out", calibration=path))
    assert not list(place.iterdir())


def test_prompts_that_cannot_be_told_apart(llava: Path, tmp_path: Path, place: Path) -> None:
    """Without a usable probe there is no patched model."""
    path = tmp_path / "prompts.jsonl"
    lines = [record(label=label, prompt="the house " * (1 + n % 3), group=n) for n in range(12) for label in (0, 1)]
    path.write_text("\n".join(lines))
    message = fails(*flags(llava, place / "out", calibration=path))
    assert "no usable probe" in message and "AUC 0.500" in message
    assert not list(place.iterdir())


# ------------------------------------------------------------------------------------- probe and settings


@pytest.mark.parametrize(
    "weight, said",
    [
        (np.ones((2, 32)), "has shapes (2, 32) and (), not (features,) and ()"),
        (np.ones(()), "not (features,) and ()"),
        (np.full(64, np.nan), "is zero, NaN or infinite"),
        (np.full(64, np.inf), "is zero, NaN or infinite"),
        (np.zeros(64), "is zero, NaN or infinite"),
        (np.ones(63), "the probe has 63 weights and the model needs 64. It was made for another model"),
        (np.ones(576), "the probe has 576 weights and the model needs 64"),
        (np.ones(0), "zero, NaN or infinite"),
    ],
    ids=["matrix", "scalar", "nan", "infinite", "zero", "one short", "another model", "empty"],
)
def test_an_unusable_probe(llava: Path, tmp_path: Path, place: Path, weight: np.ndarray, said: str) -> None:
    path = write_probe(tmp_path / "probe.safetensors", weight)
    assert said in fails(*flags(llava, place / "out", probe=path))
    assert not list(place.iterdir())


def test_a_probe_file_that_is_none(llava: Path, tmp_path: Path, place: Path) -> None:
    nan_bias = write_probe(tmp_path / "nan.safetensors", np.ones(64), float("nan"))
    other = tmp_path / "other.safetensors"
    save_file({"weight": np.ones(64, np.float32)}, other)
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors")
    half = tmp_path / "half.safetensors"
    from safetensors.torch import save_file as save_torch

    save_torch({"sasa.probe.weight": torch.ones(63, dtype=torch.bfloat16), "sasa.probe.bias": torch.zeros(())}, half)
    for path, said in (
        (tmp_path / "none.safetensors", "there is no probe file"),
        (nan_bias, "is zero, NaN or infinite"),
        (other, "has no tensor sasa.probe.weight"),
        (text, "is not valid safetensors"),
        (tmp_path, str(tmp_path)),
        (half, ""),
    ):
        assert said in fails(*flags(llava, place / "out", probe=path))
        assert not list(place.iterdir())


def test_a_probe_for_logits_that_are_changed_behind_the_head(
    tiny_model: Tiny, probe: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where logits are capped, a probe cannot be folded, and reads as many features as there are words."""
    from transformers import Gemma3ForConditionalGeneration

    forward = Gemma3ForConditionalGeneration.forward

    @functools.wraps(forward)
    def capped(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        output.logits = torch.tanh(output.logits / 5) * 5
        return output

    monkeypatch.setattr(Gemma3ForConditionalGeneration, "forward", capped)
    model = tiny_model("gemma3", final_logit_softcapping=5.0)
    message = fails(*flags(model, place / "out", probe=probe))
    vocabulary = json.loads((model / "config.json").read_text())["text_config"]["vocab_size"]
    assert f"the probe has 64 weights and the model needs {vocabulary}" in message
    message = fails(*flags(tiny_model("gemma3"), place / "out", probe=probe))
    assert "after_head" in message and "final_logit_softcapping" in message
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    "options, said",
    [
        ({"threshold": 0}, "--threshold is 0; it must lie between 0 and 1"),
        ({"threshold": 1}, "--threshold is 1;"),
        ({"threshold": 1.5}, "--threshold is 1.5;"),
        ({"threshold": -0.5}, "--threshold is -0.5;"),
        ({"threshold": "nan"}, "--threshold is nan;"),
        ({"max_false_positive_rate": -0.1}, "--max-false-positive-rate is -0.1;"),
        ({"max_false_positive_rate": 1}, "--max-false-positive-rate is 1;"),
        ({"max_false_positive_rate": "nan"}, "--max-false-positive-rate is nan;"),
        ({"epsilon": 0}, "--epsilon is 0;"),
        ({"epsilon": "nan"}, "--epsilon is nan;"),
        ({"epsilon": "inf"}, "--epsilon is inf;"),
        ({"batch_size": 0}, "--batch-size is 0;"),
        ({"refusal": " "}, "--refusal is empty"),
    ],
)
def test_a_setting_outside_its_range(llava: Path, place: Path, options: dict[str, Any], said: str) -> None:
    assert said in fails(*flags(llava, place / "out", **options))
    assert not list(place.iterdir())


def test_probe_and_calibration_together(llava: Path, probe: Path, calibration: Path, place: Path) -> None:
    message = fails(*flags(llava, place / "out", probe=probe, calibration=calibration))
    assert "--probe and --calibration exclude each other" in message
    assert not list(place.iterdir())


@pytest.mark.parametrize("device", ["no-such-device", "cuda:99"])
def test_a_device_that_is_not_there(llava: Path, place: Path, device: str) -> None:
    fails(*flags(llava, place / "out", device=device))
    assert not list(place.iterdir())


def test_options_that_the_parser_refuses(llava: Path, place: Path) -> None:
    """These come from click, with its usage lines and its exit code 2, and a last line that says what is wrong."""
    cases = [
        ["--model", str(llava)],
        ["--out", str(place / "out")],
        flags(llava, place / "out", safety_layer="x"),
        flags(llava, place / "out", dtype="int3"),
        flags(llava, place / "out", "--no-such-option"),
    ]
    for arguments in cases:
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith("Error:")
        assert not list(place.iterdir())
