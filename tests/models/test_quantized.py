"""Checkpoints that somebody quantized are sources like any other, and what does not run here is refused by its name."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import labelled
import numpy as np
import pytest
import quantized
import tiny
import torch
from cli_steps import copied, fails, flags, succeeds
from safetensors.torch import load_file, save_file

import sasa_export
from sasa_export.models import open_source
from sasa_export.models.load import _finite, head_weight, load_model
from sasa_export.options import Options
from sasa_export.verify import verify_directory

FP8 = "fine-grained FP8"  # transformers alone loads it
UP = "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized.build(FP8, tmp_path_factory.mktemp("fp8"), hidden_size=tiny.HIDDEN)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", quantized.SCHEMES)
def test_a_quantized_source_is_exported_and_verified(scheme: str, tmp_path: Path) -> None:
    """Copied byte for byte, calibrated as it runs, and every check in a fresh process."""
    source = quantized.build(scheme, tmp_path)
    calibration = labelled.write_set(tmp_path, "calibration", 1, 12)
    alone = scheme.endswith(("MXFP4", " NVFP4"))  # states of 4 bits round by what shares their batch
    options = Options(
        str(source), tmp_path / "out", calibration=(str(calibration),), max_false_positive_rate=0.2,
        safety_layer=labelled.SAFETY, semantic_layer=labelled.SEMANTIC, batch_size=1 if alone else 8,
        refusal="I will not help.",
    )  # fmt: skip
    assert sasa_export.patch(options).calibration is not None
    copy = tmp_path / "out" / "model-00001-of-00002.safetensors"
    assert copy.read_bytes() == (source / "model.safetensors").read_bytes()
    assert all(check.passed for check in verify_directory(tmp_path / "out", only_files=True))


@pytest.mark.parametrize(
    ("scheme", "reason"), [("nvfp4", "not supported yet"), ("unheard-of", "no loader of this name")]
)
def test_a_scheme_that_does_not_run_here(
    llava: Path, probe: Path, tmp_path: Path, place: Path, scheme: str, reason: str
) -> None:
    source = copied(llava, tmp_path)
    quantized.write_scheme(source, {"quant_method": scheme})
    said = fails(*flags(source, place / "out", probe=probe, verify="files"))
    assert f"is quantized by {scheme}, which does not run here" in said and reason in said
    assert "give the model that it was quantized from" in said


def test_a_quantized_source_without_loading(fp8: Path, probe: Path, place: Path) -> None:
    succeeds(*flags(fp8, place / "out", probe=probe, verify="files"))
    written = json.loads((place / "out" / "config.json").read_text())
    assert written["quantization_config"] == json.loads((fp8 / "config.json").read_text())["quantization_config"]


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no scales": (lambda tensors: tensors.pop(f"{UP}_scale_inv"), "is F8_E4M3, and its scales are not there"),
    "no weight": (lambda tensors: tensors.pop(UP), f"1 missing keys ({UP})"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_quantized_shard(fp8: Path, probe: Path, tmp_path: Path, place: Path, damage: str) -> None:
    """Seen when it is loaded, and without scales before that: it would be loaded all the same."""
    source, (change, words) = copied(fp8, tmp_path), DAMAGE[damage]
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    said = fails(*flags(source, place / "out", probe=probe))
    assert words in said and "estore the" in said.replace("restore", "Restore")


def test_numbers_of_8_bits_are_looked_at() -> None:
    assert _finite(torch.ones(3, dtype=torch.float8_e4m3fn)) and _finite(torch.ones(3, dtype=torch.int8))
    assert not _finite(torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn))


@pytest.mark.slow
def test_a_head_that_is_quantized_too(tmp_path: Path) -> None:
    """The probe is folded through what the head multiplies by, and not through the numbers that it keeps."""
    quantized.wanted("bitsandbytes")
    plain = tiny.build("llava", tmp_path / "plain", **quantized.WIDE)
    quantized.bitsandbytes(plain, tmp_path / "out", kept=quantized.KEPT[1:], load_in_8bit=True)
    quantized.finish(plain, tmp_path / "out")
    load = partial(load_model, dtype="float32", device="cpu")
    wanted, found = (head_weight(load(open_source(str(path)))) for path in (plain, tmp_path / "out"))
    np.testing.assert_allclose(found, wanted, atol=0.02)
