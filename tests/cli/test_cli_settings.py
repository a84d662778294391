"""What a patch is told: calibration prompts, a probe, options. Whatever is wrong with them is said in one line."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_steps import Tiny, fails, flags, invoke, message_of, write_probe
from safetensors.numpy import save_file

from sasa_export import patch
from sasa_export.errors import SasaExportError
from sasa_export.options import Options
from sasa_export.research.options import EvaluateOptions


def record(label: int, number: int, **fields: Any) -> str:
    return json.dumps({"image": None, "prompt": f"the old house {number}", "label": label, **fields})


@pytest.mark.parametrize(
    "lines, said",
    [
        ([record(2, 0)], "line 1 has the label 2; it must be 0 (harmless) or 1 (harmful)"),
        ([record(1, number) for number in range(20)], "fewer than 5 are harmless (label 0)"),
        ([record(number % 2, number, group="all") for number in range(20)], "group"),
    ],
    ids=["label", "harmful alone", "one group"],
)
def test_calibration_that_no_probe_can_be_fitted_on(
    llava: Path, tmp_path: Path, place: Path, lines: list[str], said: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines))
    assert said in fails(*flags(llava, place / "out", calibration=path))


def test_calibration_prompts_are_read_before_the_model_is_opened(tmp_path: Path, place: Path) -> None:
    """A typo costs no time."""
    message = fails(*flags(tmp_path / "no model", place / "out", calibration=tmp_path / "typo.jsonl"))
    assert "there is no calibration file or directory" in message and "no model" not in message


def test_prompts_that_cannot_be_told_apart(llava: Path, tmp_path: Path, place: Path) -> None:
    """Without a usable probe there is no patched model."""
    path = tmp_path / "prompts.jsonl"
    lines = [record(label, n, prompt="the house " * (1 + n % 3), group=n) for n in range(12) for label in (0, 1)]
    path.write_text("\n".join(lines))
    message = fails(*flags(llava, place / "out", calibration=path))
    assert "no usable probe" in message and "AUC 0.500" in message


def of_other_tensors(path: Path) -> None:
    save_file({"weight": np.ones(64, np.float32)}, path)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (partial(write_probe, weight=np.ones((2, 32))), "has shapes (2, 32) and (), not (features,) and ()"),
        (partial(write_probe, weight=np.full(64, np.nan)), "is zero, NaN or infinite"),
        (partial(write_probe, weight=np.ones(64), bias=np.inf), "is zero, NaN or infinite"),
        (partial(write_probe, weight=np.zeros(64)), "is zero, NaN or infinite"),
        (
            partial(write_probe, weight=np.ones(63)),
            "the probe has 63 weights and the model needs 192. It was made for another model.",
        ),
        (lambda path: None, "there is no probe file"),
        (of_other_tensors, "has no tensor sasa.probe.weight"),
        (lambda path: path.write_text("no tensors"), "is not valid safetensors"),
    ],
    ids=["matrix", "NaN", "infinite bias", "zero", "another model", "none", "other tensors", "text"],
)
def test_an_unusable_probe(llava: Path, tmp_path: Path, place: Path, write: Callable[[Path], Any], said: str) -> None:
    write(tmp_path / "probe.safetensors")
    assert said in fails(*flags(llava, place / "out", probe=tmp_path / "probe.safetensors"))


def test_a_probe_for_logits_that_are_capped_behind_the_head(tiny_model: Tiny, probe: Path, place: Path) -> None:
    """It cannot be folded, and reads as many features as the vocabulary has tokens; the cap has to be applied."""
    model = tiny_model("gemma4")
    vocabulary = json.loads((model / "config.json").read_text())["text_config"]["vocab_size"]
    message = fails(*flags(model, place / "out", probe=probe, safety_layer=2, semantic_layer=3))
    assert f"the probe has 192 weights and the model needs {vocabulary + 2 * 32}." in message


@pytest.mark.parametrize("device", ["no-such-device", "cuda:99"])
def test_a_device_that_is_not_there(llava: Path, place: Path, device: str) -> None:
    assert f"--device {device} cannot be used here" in fails(*flags(llava, place / "out", device=device))


# ----------------------------------------------------------------------------------------------- options

GIVEN = {"probe": Path("probe.safetensors")}


@pytest.mark.parametrize(
    "options, said",
    [
        ({"threshold": 0.0}, "--threshold cannot be 0.0: 0.0 is not in the range 0<x<1."),
        ({"threshold": float("nan")}, "--threshold cannot be nan: nan is no number."),
        ({"max_false_positive_rate": 1.0}, "--max-false-positive-rate cannot be 1.0: 1.0 is not in the range 0<=x<1."),
        ({"safety_layer": "x"}, "--safety-layer cannot be 'x': 'x' is not a valid integer, nor auto."),
        ({"refusal": " "}, "--refusal is empty"),
        ({"calibration": ("a.jsonl",), **GIVEN}, "--probe and --calibration exclude each other"),
        ({"safety_layer": "auto", **GIVEN}, "--probe and layers left to auto exclude each other"),
        ({"projection": "none", "safety_layer": 2}, "--safety-layer has no effect with --projection none"),
        ({"onnx_dtype": "int8"}, "--onnx-dtype has no effect without --format onnx or both. Leave it out."),
        ({"regularization": 1.0, **GIVEN}, "--regularization has no effect with --probe, since nothing is calibrated"),
        (
            {"max_false_positive_rate": 0.1, "threshold": 0.5},
            "--max-false-positive-rate has no effect with --threshold",
        ),
    ],
)
def test_settings_out_of_range_or_at_odds(options: dict[str, Any], said: str) -> None:
    Options().check()
    with pytest.raises(SasaExportError) as caught:
        Options(**options).check()
    assert said in str(caught.value)


@pytest.mark.parametrize("refusal", ["</s>", "No. </s> Sure:", "<image>", "See <image> here."])
def test_a_refusal_that_is_no_sentence(llava: Path, calibration: Path, place: Path, refusal: str) -> None:
    """Before the work, since that takes hours for a large model."""
    result = invoke(*flags(llava, place / "out", calibration=calibration, refusal=refusal))
    message = message_of(result.exit_code, result.stderr)
    assert "--refusal" in message and "holds a special token" in message
    assert "calibrate" not in result.stderr and not list(place.iterdir())


def test_paths_as_text_and_text_as_paths(llava: Path, calibration: Path, place: Path) -> None:
    """In Python, a path may be given where the command line has a name, and the other way round."""
    options = Options(model=llava, out=str(place / "out"), calibration=str(calibration))  # type: ignore[arg-type]
    assert (options.model, options.out, options.calibration) == (str(llava), place / "out", (str(calibration),))
    given = Options(model="x", out=place, probe="p.safetensors", calibration=[calibration])  # type: ignore[arg-type]
    assert (given.probe, given.calibration) == (Path("p.safetensors"), (str(calibration),))
    report = EvaluateOptions(model=str(llava), out="report", data=calibration)  # type: ignore[arg-type]
    assert (report.model, report.out, report.data) == (llava, Path("report"), (str(calibration),))
    found = patch(replace(options, max_false_positive_rate=0.1, verify="files"))
    assert found.directory == place / "out" and found.calibration is not None


def test_the_command_line_checks_its_options(llava: Path, place: Path) -> None:
    said = fails(*flags(llava, place, projection="none", safety_layer=1))
    assert "--safety-layer has no effect with --projection none" in said
