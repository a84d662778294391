"""What the command writes: the same bytes each time, links, shards, settings, a whole run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_steps import Tiny, change_tensors, contents, copied, flags, flip, invoke, message_of, script, succeeds
from safetensors.numpy import load_file

from sasa_export.writers import weights

SHARD, PROBE = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("kind", ["given", "fitted"])
def test_same_inputs_give_the_same_bytes(
    tiny_model: Tiny, probe: Path, calibration: Path, place: Path, kind: str
) -> None:
    fitted = {"calibration": calibration, "max_false_positive_rate": 0.1}
    options: dict[str, Any] = fitted if kind == "fitted" else {"probe": probe}
    for out in ("first", "second"):
        succeeds(*flags(tiny_model("llava", shards=3), place / out, verify="files", **options))
    first, second = contents(place / "first"), contents(place / "second")
    assert first == second
    assert ("sasa-calibration.json" in first) == (kind == "fitted")
    assert {path.stat().st_mode & 0o777 for path in (place / "first").iterdir() if path.is_file()} == {0o644}


def test_a_sharded_source_keeps_its_shards(tiny_model: Tiny, probe: Path, place: Path) -> None:
    from transformers import AutoModelForImageTextToText

    source, out = tiny_model("llava", shards=3), place / "out"
    succeeds(*flags(source, out, probe=probe, verify="files"))
    before, after = contents(source), contents(out)
    shards = {name: data for name, data in before.items() if name.endswith(".safetensors")}
    assert len(shards) == 4
    assert {name: after[name] for name in after if name.endswith(".safetensors")} == {
        **shards, "sasa-probe.safetensors": after["sasa-probe.safetensors"],
    }  # fmt: skip
    index = "model.safetensors.index.json"
    added = {"sasa.probe.weight": "sasa-probe.safetensors", "sasa.probe.bias": "sasa-probe.safetensors"}
    assert json.loads(after[index])["weight_map"] == {**json.loads(before[index])["weight_map"], **added}
    model = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    np.testing.assert_array_equal(model.sasa.probe.weight.detach(), load_file(probe)["sasa.probe.weight"])


@pytest.mark.parametrize("cached", [False, True], ids=["files", "links of the hub's cache"])
def test_link_and_copy(llava: Path, probe: Path, place: Path, tmp_path: Path, cached: bool) -> None:
    """The hub's cache holds links to blobs: what is written are files, and `--link` links the blob."""
    source = blobs = copied(llava, tmp_path)
    if cached:
        source = tmp_path / "models--owner--name" / "snapshots" / "0123"
        source.mkdir(parents=True)
        blobs = blobs.rename(source.parents[1] / "blobs")
        for path in blobs.iterdir():
            (source / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    succeeds(*flags(source, place / "linked", "--link", probe=probe, verify="files"))
    succeeds(*flags(source, place / "copied", probe=probe, verify="files"))
    assert contents(place / "linked") == contents(place / "copied")
    assert (place / "linked" / SHARD).samefile(blobs / "model.safetensors")
    assert not any(path.is_symlink() for path in place.rglob("*"))
    assert {path.name for path in (place / "linked").iterdir() if path.stat().st_nlink == 2} == {SHARD}


def test_the_settings_that_are_written(llava: Path, probe: Path, place: Path) -> None:
    options = {"safety_layer": 1, "semantic_layer": 4, "threshold": 0.7, "refusal": "the old house"}
    succeeds(*flags(llava, place / "out", probe=probe, verify="files", **options))
    config = json.loads((place / "out" / "config.json").read_text())
    assert config["model_type"] == "sasa_llava"
    assert {name: config["sasa"][name] for name in options} == options
    assert config["sasa"]["refusal_token_ids"][-1] == 2 and len(config["sasa"]["refusal_token_ids"]) > 2
    written, given = load_file(place / "out" / PROBE), load_file(probe)
    assert written.keys() == given.keys() and all((written[name] == given[name]).all() for name in given)
    manifest = json.loads((place / "out" / "sasa-export.json").read_text())
    assert set(manifest["files"]) == set(contents(place / "out")) - {"sasa-export.json"}
    assert manifest["options"]["threshold"] == 0.7 and manifest["options"]["verify"] == "files"
    card = (place / "out" / "README.md").read_text()
    assert "Only the files were checked" in card and "the old house" in card and "```mermaid" in card


@pytest.mark.slow
def test_a_full_run(llava: Path, calibration: Path, place: Path) -> None:
    """Calibrated on a file of the user's, verified in a fresh process, and verified again by the script."""
    out = place / "out"
    options: dict[str, Any] = {"safety_layer": 1, "semantic_layer": 3, "max_false_positive_rate": 0.1}
    result = succeeds(*flags(llava, out, calibration=calibration, **options))
    assert "✗" not in result.stderr and "✓" in result.stderr and "48 prompts: AUC" in result.stderr
    scores = json.loads((out / "sasa-calibration.json").read_text())
    assert {(figure["feature"], figure["part"]) for figure in scores["figures"]} == {
        (feature, channel) for feature in ("projected", "plain") for channel in ("text", "picture", "all")
    }
    harmless = [prompt["cross_validated"] for prompt in scores["prompts"] if prompt["label"] == 0]
    assert len(harmless) == 24 and sum(score >= scores["threshold"] for score in harmless) <= 0.1 * len(harmless)
    cases = json.loads((out / "sasa-verify" / "cases.json").read_text())["cases"]
    assert len(cases) == 16 and sum(case["image"] is not None for case in cases) == 8
    card = (out / "README.md").read_text()
    assert "allows at most 10.0% of the ordinary harmless prompts" in card and "Checked in a fresh process" in card

    again = script("verify", str(out))
    assert again.returncode == 0 and "✗" not in again.stderr, again.stderr
    # The header of a shard, so that the model does not even load: the file is named all the same.
    flip(out / SHARD, 20)
    spoiled = invoke("verify", str(out))
    assert spoiled.exit_code == 1 and SHARD in spoiled.stderr


@pytest.mark.slow
def test_a_failed_verification_writes_nothing(
    llava: Path, probe: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that change on their way are found by the check of answers, and then there is no output."""
    bring = weights.bring

    def double(tensors: dict[str, np.ndarray]) -> None:
        tensors[next(name for name in tensors if "layers.5.mlp.down_proj" in name)] *= 2

    def spoiled(source: Path, target: Path, **options: Any) -> str:
        bring(source, target, **options)
        change_tensors(target, double)
        return ""

    monkeypatch.setattr(weights, "bring", spoiled)
    result = invoke(*flags(llava, place / "out", probe=probe))
    assert "✗" in result.stderr and "so nothing was written" in message_of(result.exit_code, result.stderr)
    assert not list(place.iterdir())
