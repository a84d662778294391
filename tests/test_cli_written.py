"""What the command writes: the same bytes each time, links, shards, settings, a whole run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cli_steps import Tiny, contents, copied, fails, flags, flip, invoke, message_of, plenty, script, succeeds
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from sasa_export.cli import main
from sasa_export.writers import weights

# ------------------------------------------------------------------------------------------ what is written


def test_same_inputs_give_the_same_bytes(tiny_model: Tiny, probe: Path, calibration: Path, place: Path) -> None:
    source = tiny_model("llava", shards=3)
    kinds: dict[str, dict[str, Any]] = {
        "given": {"probe": probe},
        "fitted": {"calibration": calibration, "max_false_positive_rate": 0.1},
    }
    for kind, options in kinds.items():
        outputs = [place / f"{kind}-{number}" for number in range(2)]
        for out in outputs:
            succeeds(*flags(source, out, verify="files", **options))
        first, second = map(contents, outputs)
        assert list(first) == list(second)
        assert [name for name in first if first[name] != second[name]] == []
        assert ("sasa-calibration.json" in first) == (kind == "fitted")
        assert [oct(path.stat().st_mode & 0o777) for path in outputs[0].iterdir() if path.is_file()] == ["0o644"] * len(
            list(outputs[0].iterdir())
        )


def test_link_and_copy(llava: Path, probe: Path, place: Path, tmp_path: Path) -> None:
    source = copied(llava, tmp_path)
    succeeds(*flags(source, place / "linked", "--link", probe=probe, verify="files"))
    succeeds(*flags(source, place / "copied", probe=probe, verify="files"))
    shard, name = source / "model.safetensors", "model-00001-of-00002.safetensors"
    assert (place / "linked" / name).samefile(shard)
    assert not (place / "copied" / name).samefile(shard)
    assert shard.stat().st_nlink == 2
    for path in sorted((place / "linked").iterdir()):
        assert path.name == name or path.stat().st_nlink == 1
    assert contents(place / "linked") == contents(place / "copied")
    succeeds("verify", str(place / "linked"), "--files")


def test_link_asks_for_no_space(
    llava: Path, probe: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """70 MB free is too little for the 1 MB model and 64 MB of spare in copies only where the model is larger."""
    source = copied(llava, tmp_path)
    free = shutil._ntuple_diskusage(10**9, 0, 64_500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    assert "GB free" in fails(*flags(source, place / "out", probe=probe, verify="files"))
    succeeds(*flags(source, place / "out", "--link", probe=probe, verify="files"))


def test_link_across_disks_copies(
    llava: Path, probe: Path, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", plenty)
    out = small_disk(4_000_000) / "out"
    succeeds(*flags(llava, out, "--link", probe=probe, verify="files"))
    assert (out / "model-00001-of-00002.safetensors").read_bytes() == (llava / "model.safetensors").read_bytes()


def test_a_sharded_source_keeps_its_shards(tiny_model: Tiny, probe: Path, place: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    source, out = tiny_model("llava", shards=3), place / "out"
    succeeds(*flags(source, out, probe=probe, verify="files"))
    shards = {path.name: path.read_bytes() for path in source.glob("*.safetensors")}
    assert len(shards) == 4
    written = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    assert {name: data for name, data in written.items() if name != "sasa-probe.safetensors"} == shards
    before = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    after = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    added = {"sasa.probe.weight": "sasa-probe.safetensors", "sasa.probe.bias": "sasa-probe.safetensors"}
    assert after == {**before, **added}
    model = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    np.testing.assert_array_equal(model.sasa.probe.weight.detach(), load_file(probe)["sasa.probe.weight"])
    inputs = tiny.prompts(AutoProcessor.from_pretrained(source), images=True, count=2, seed=0, padding_side="left")
    assert torch.isfinite(model(**inputs).unsafe_probability).all()


def test_a_source_behind_links(llava: Path, probe: Path, place: Path, tmp_path: Path) -> None:
    """The hub's cache holds links to blobs: what is written are files, and `--link` links the blob."""
    repository = tmp_path / "models--owner--name"
    source, blobs = repository / "snapshots" / "0123", repository / "blobs"
    source.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(llava.iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (source / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    succeeds(*flags(source, place / "copied", probe=probe, verify="files"))
    succeeds(*flags(source, place / "linked", "--link", probe=probe, verify="files"))
    assert not any(path.is_symlink() for path in place.rglob("*"))
    assert contents(place / "copied") == contents(place / "linked")
    assert (place / "linked" / "model-00001-of-00002.safetensors").samefile(source / "model.safetensors")


def test_the_settings_that_are_written(llava: Path, probe: Path, place: Path) -> None:
    options = {"safety_layer": 1, "semantic_layer": 4, "threshold": 0.7, "epsilon": 1e-5, "refusal": "the old house"}
    succeeds(*flags(llava, place / "out", probe=probe, verify="files", **options))
    config = json.loads((place / "out" / "config.json").read_text())
    assert config["model_type"] == "sasa_llava"
    sasa = config["sasa"]
    assert {name: sasa[name] for name in options} == options
    assert sasa["refusal_token_ids"][-1] == 2 and len(sasa["refusal_token_ids"]) > 2
    tensors = load_file(place / "out" / "model-00002-of-00002.safetensors")
    given = load_file(probe)
    assert {name: tensor.tobytes() for name, tensor in tensors.items()} == {
        name: tensor.tobytes() for name, tensor in given.items()
    }
    assert tensors["sasa.probe.bias"].shape == ()
    manifest = json.loads((place / "out" / "sasa-export.json").read_text())
    assert set(manifest["files"]) == set(contents(place / "out")) - {"sasa-export.json"}
    assert manifest["options"]["threshold"] == 0.7 and manifest["options"]["verify"] == "files"
    card = (place / "out" / "README.md").read_text()
    assert "Only the files were checked" in card and "the old house" in card and "```mermaid" in card


def test_a_full_run(llava: Path, calibration: Path, place: Path) -> None:
    """Calibrated on a file of the user's, verified in a fresh process, and verified again by the script."""
    out = place / "out"
    result = succeeds(
        *flags(llava, out, calibration=calibration, safety_layer=1, semantic_layer=3, max_false_positive_rate=0.1)
    )
    assert "✗" not in result.stderr and result.stderr.count("✓") == 12
    assert "48 prompts: AUC" in result.stderr
    scores = json.loads((out / "sasa-calibration.json").read_text())
    assert len(scores["prompts"]) == 48
    assert {(figure["feature"], figure["channel"]) for figure in scores["figures"]} == {
        (feature, channel) for feature in ("projected", "plain") for channel in ("text", "picture", "all")
    }
    harmless = [prompt["cross_validated"] for prompt in scores["prompts"] if prompt["label"] == 0]
    assert sum(score >= scores["threshold"] for score in harmless) <= 0.1 * len(harmless)
    cases = json.loads((out / "sasa-verify" / "cases.json").read_text())["cases"]
    assert len(cases) == 16 and sum(case["image"] is not None for case in cases) == 8
    card = (out / "README.md").read_text()
    assert "The threshold allows at most 10.0% of the harmless" in card
    assert "with projection | picture | 24" in card and "Checked in a fresh process" in card

    again = script("verify", str(out))
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("✓") == 13 and "✗" not in again.stderr

    # The header of a shard, so that the model does not even load: the file is named all the same.
    flip(out / "model-00001-of-00002.safetensors", 20)
    spoiled = invoke("verify", str(out))
    assert spoiled.exit_code == 1
    assert "model-00001-of-00002.safetensors" in spoiled.stderr


def test_a_short_lane_and_shares(llava: Path, calibration: Path, place: Path) -> None:
    """A probe amid the second lane whose P(unsafe) is a share: calibrated, written and verified."""
    out = place / "out"
    options: dict[str, Any] = {"safety_layer": 1, "semantic_layer": 3, "probe_block": 2, "probe_positions": 2}
    options |= {"probabilities": "calibrated", "threshold": 0.4}
    result = succeeds(*flags(llava, out, calibration=calibration, max_false_positive_rate=0.1, **options))
    assert "✗" not in result.stderr and "P(unsafe) is that of the calibration" in result.stderr
    sasa = json.loads((out / "config.json").read_text())["sasa"]
    assert sasa["probe_block"] == 2 and [n["index"] for n in sasa["graph"] if n["op"] == "lane_block"] == [2]
    scores = json.loads((out / "sasa-calibration.json").read_text())
    assert scores["mapping"]["slope"] > 0 and scores["threshold"] == sasa["threshold"] == 0.4
    assert scores["max_false_positive_rate"] is None
    harmful = [prompt["cross_validated"] for prompt in scores["prompts"] if prompt["label"] == 1]
    caught = next(
        one["recall"] for one in scores["figures"] if (one["feature"], one["channel"]) == ("projected", "all")
    )
    assert caught == round(sum(score >= 0.4 for score in harmful) / len(harmful), 4)
    average = sum(prompt["cross_validated"] for prompt in scores["prompts"]) / len(scores["prompts"])
    assert abs(average - 0.5) < 0.01, "half of these prompts are harmful"
    card = (out / "README.md").read_text()
    assert "it is the share of harmful prompts" in card and "The threshold was given (`--threshold`)" in card


def test_a_failed_verification_writes_nothing(
    llava: Path, probe: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that change on their way are found by the check of answers, and then there is no output."""
    bring = weights._bring

    def spoiled(source: Path, target: Path, **options: Any) -> str:
        bring(source, target, **options)
        tensors = load_file(target)
        tensors[next(name for name in tensors if "layers.5.mlp.down_proj" in name)] *= 2
        save_file(tensors, target, metadata={"format": "pt"})
        return ""

    monkeypatch.setattr(weights, "_bring", spoiled)
    result = invoke(*flags(llava, place / "out", probe=probe))
    assert result.exit_code == 1
    assert "✗" in result.stderr
    assert "so nothing was written" in message_of(1, result.stderr)
    assert not list(place.iterdir())


@pytest.mark.parametrize("above", [False, True], ids=["the source itself", "a directory above it"])
def test_an_output_that_would_remove_its_source(tmp_path: Path, above: bool) -> None:
    """--force replaces what is at --out, which must not be the model that is being patched."""
    source = tmp_path / "models" / "base"
    source.parent.mkdir()
    tiny.build("llava", source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    out = source.parent if above else source
    result = CliRunner().invoke(main, ["--model", str(source), "--out", str(out), "--force", "--verify", "files"])
    assert result.exit_code == 1
    assert "source model" in result.output + result.stderr
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
