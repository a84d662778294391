"""The models that a patch is given: those it refuses, and weights that are damaged. Each ends in one line."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_steps import Tiny, change_tensors, copied, fails, flags, flip, succeeds
from safetensors.numpy import save_file

from sasa_export.models import layers_of, open_source
from sasa_export.models.load import read_sizes


@pytest.mark.parametrize(
    "name, said",
    [
        ("no-such-model", "there is no model 'no-such-model'"),
        ("./no/such/directory", "Aliases: aya-vision, "),
        ("nobody/no-such-model", "nobody/no-such-model could not be fetched from the hub"),
    ],
)
def test_a_model_that_is_nowhere(place: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert said in fails(*flags(name, place / "out"))


@pytest.mark.parametrize(
    "config, said",
    [
        (None, "has no config.json"),
        ("{not json", "is not valid JSON"),
        ("[]", "does not hold a JSON object"),
        ("{}", "model type None is not supported. Supported: aya_vision, cohere2_vision"),
        ('{"model_type": "llava"}', "missing keys"),
        ('{"model_type": "llava", "text_config": {"model_type": "no_such_decoder"}}', "is damaged"),
        ('{"model_type": "llava", "text_config": {"num_hidden_layers": "six"}}', "is damaged"),
    ],
)
def test_a_damaged_config(llava: Path, probe: Path, tmp_path: Path, place: Path, config: str | None, said: str) -> None:
    model = copied(llava, tmp_path)
    (model / "config.json").unlink()
    if config is not None:
        (model / "config.json").write_text(config)
    assert said in fails(*flags(model, place / "out", probe=probe, verify="files"))


def test_a_config_that_leaves_out_what_is_usual(tmp_path: Path) -> None:
    """LLaVA-1.5-7B's config.json names neither its hidden size nor its number of blocks: both are Llama's own."""
    config: dict[str, Any] = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"none": np.zeros(1)}, tmp_path / "model.safetensors")
    source = open_source(str(tmp_path))
    sizes = read_sizes(source)
    assert (sizes.blocks, sizes.hidden, sizes.vocabulary) == (32, 4096, 32064)
    safety, semantic, layers_from = layers_of(source, sizes.blocks, sizes.hidden, None, None)
    assert (safety, semantic) == (13, 15) and "arXiv 2507.21637" in layers_from


def test_a_shape_that_no_family_file_knows(llava: Path) -> None:
    assert "scaled by depth from LLaVA-1.5-7B, not measured" in succeeds("trace", "--model", str(llava)).stdout


def test_a_patched_model_as_the_source(patched: Path, place: Path) -> None:
    assert "patched model already" in fails(*flags(patched, place / "out"))


# ------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, path.stat().st_size - 100),
        lambda path: flip(path, 20),
        lambda path: os.truncate(path, 0),
    ],
    ids=["cut off", "header", "empty"],
)
def test_a_corrupt_shard(
    tiny_model: Tiny, tmp_path: Path, place: Path, damage: Callable[[Path], Any], shards: int
) -> None:
    model = copied(tiny_model("llava", shards=shards), tmp_path)
    shard = sorted(model.glob("*.safetensors"))[-1]
    damage(shard)
    assert f"the shard {shard} is corrupt" in fails(*flags(model, place / "out"))


FIRST = "model-00001-of-00004.safetensors"


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda names: names.update({"extra.weight": FIRST}), f"extra.weight is in {FIRST}, and it is not"),
        (lambda names: names.clear(), "missing keys"),
        (lambda names: names.update({"lm_head.weight": "none.safetensors"}), "none.safetensors is missing"),
        (lambda names: names.update({"lm_head.weight": 3}), "is not a valid index of shards"),
        (lambda names: names.update({"lm_head.weight": "../x.safetensors"}), "'../x.safetensors', which lies outside"),
        (lambda names: names.update({"lm_head.weight": "/etc/passwd"}), "'/etc/passwd', which lies outside"),
    ],
)
def test_an_index_that_does_not_fit_its_shards(
    tiny_model: Tiny, probe: Path, tmp_path: Path, place: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    model = copied(tiny_model("llava", shards=3), tmp_path)
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    assert said in fails(*flags(model, place / "out", probe=probe, verify="files"))


UP = "model.language_model.layers.4.mlp.up_proj.weight"


def named(tensors: dict[str, np.ndarray]) -> str:
    return next(name for name in tensors if name.endswith("layers.4.mlp.up_proj.weight"))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda tensors: tensors[named(tensors)].__setitem__((3, 5), np.nan), f"NaN or infinity in {UP}"),
        (lambda tensors: tensors.pop(named(tensors)), f"1 missing keys ({UP})"),
        (lambda tensors: tensors.update({"extra.weight": np.zeros(2, np.float32)}), "1 unexpected keys (extra.weight)"),
        (
            lambda tensors: tensors.update({named(tensors): tensors[named(tensors)][:-1].copy()}),
            f"1 mismatched keys ({UP}, (95, 64) in the shards",
        ),
    ],
    ids=["NaN", "missing", "unexpected", "mismatched"],
)
def test_weights_that_make_a_wrong_model(
    llava: Path, probe: Path, tmp_path: Path, place: Path, change: Callable[[dict[str, np.ndarray]], Any], said: str
) -> None:
    model = copied(llava, tmp_path)
    change_tensors(model / "model.safetensors", change)
    assert said in fails(*flags(model, place / "out", probe=probe))
