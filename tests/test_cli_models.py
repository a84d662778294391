"""The command line and the model it is given: help, models it refuses, damaged weights.

The console script runs in a process of its own where its exit code, its signals or its standard error are the
point; elsewhere click's runner calls it in this process, which has torch imported already.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_steps import Tiny, copied, fails, flags, flip, script, script_fails, succeeds
from safetensors.numpy import load_file, save_file

# ------------------------------------------------------------------------------------------------- help


def test_help_needs_no_heavy_import() -> None:
    """`--help` is quick because of what it does not import: a clock would say so only on an idle machine."""
    code = (
        "import sys\nfrom sasa_export.cli import main\n"
        "for arguments in (['--help'], ['trace', '--help'], ['--version']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'scipy', 'onnx', 'onnxruntime', 'matplotlib', 'PIL', 'numpy'}\n"
        "print('imported:', sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "imported: []"


def test_help_of_the_console_script() -> None:
    result = script("--help")
    assert result.returncode == 0 and not result.stderr
    for word in ("--model", "--out", "--safety-layer", "--calibration", "--probe", "fetch", "trace", "verify"):
        assert word in result.stdout


# -------------------------------------------------------------------------------------- models it refuses


@pytest.mark.parametrize("name", ["no-such-model", "./no/such/directory", "/nor/this"])
def test_unknown_model(place: Path, name: str) -> None:
    message = script_fails(*flags(name, place / "out"))
    assert f"there is no model '{name}'" in message and "smol-llava" in message
    assert not list(place.iterdir())


def test_unknown_hub_id(place: Path) -> None:
    message = script_fails(*flags("nobody/no-such-model", place / "out"))
    assert "nobody/no-such-model could not be fetched from the hub" in message
    assert not list(place.iterdir())


@pytest.mark.parametrize("model_type", ["bert", None, ["llava"], {"a": 1}])
def test_unsupported_family(llava: Path, tmp_path: Path, place: Path, model_type: Any) -> None:
    model = copied(llava, tmp_path)
    (model / "config.json").write_text(json.dumps({"model_type": model_type}))
    message = fails(*flags(model, place / "out"))
    assert f"model type {model_type!r} is not supported" in message
    for supported in ("gemma3", "idefics3", "llava", "llava_next", "qwen2_5_vl", "smolvlm"):
        assert supported in message
    assert not list(place.iterdir())


def test_unsupported_family_through_the_script(tmp_path: Path, place: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    message = script_fails(*flags(tmp_path, place / "out"))
    assert "model type 'bert' is not supported. Supported: gemma3, idefics3, llava" in message
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    "config",
    [
        None,
        "{not json",
        "[]",
        '"llava"',
        '{"model_type": "llava"}',
        '{"model_type": "llava", "text_config": {"model_type": "no_such_decoder"}}',
        '{"model_type": "llava", "text_config": {"num_hidden_layers": "six"}}',
        '{"model_type": "llava", "text_config": []}',
        "[" * 100_000,
    ],
    ids=["missing", "no JSON", "a list", "a string", "bare", "unknown decoder", "no number", "no object", "deep"],
)
def test_damaged_config(llava: Path, probe: Path, tmp_path: Path, place: Path, config: str | None) -> None:
    model = copied(llava, tmp_path)
    (model / "config.json").unlink()
    if config is not None:
        (model / "config.json").write_text(config)
    fails(*flags(model, place / "out", probe=probe, verify="files"))
    assert not list(place.iterdir())


def test_a_config_that_leaves_out_what_is_usual(tmp_path: Path) -> None:
    """LLaVA-1.5-7B's config.json names neither its hidden size nor its number of blocks: both are Llama's own."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config: dict[str, Any] = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        tensors = LlavaForConditionalGeneration(LlavaConfig(**config)).state_dict()
    # A file of 28 GB with nothing in it but its header: a trace reads no more of it.
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + 4 * tensor.numel()]}
        end += 4 * tensor.numel()
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(tmp_path / "model.safetensors", 8 + len(text) + end)
    printed = succeeds("trace", "--model", str(tmp_path)).stdout
    assert "safety layer 13, semantic layer 15" in printed and "arXiv 2507.21637" in printed
    assert "blocks 0 to 31" in printed


def test_a_patched_model_as_the_source(patched: Path, place: Path) -> None:
    message = fails(*flags(patched, place / "out"))
    assert "patched model already" in message
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    "safety, semantic", [(3, 3), (4, 2), (2, 6), (6, 7), (-1, 3), (2, -1), (99, 100), (5, None), (None, 0)]
)
def test_layers_outside_their_range(llava: Path, place: Path, safety: int | None, semantic: int | None) -> None:
    given = {"safety_layer": safety, "semantic_layer": semantic}
    options = {name: value for name, value in given.items() if value is not None}
    message = fails(*flags(llava, place / "out", **options))
    assert "0 <= safety layer < semantic layer <= 5 must hold" in message
    assert all(str(value) in message for value in options.values())
    assert not list(place.iterdir())
    arguments = flags(llava, place / "out", **options)
    assert "must hold" in fails("trace", *arguments[:2], *arguments[4:])


# ---------------------------------------------------------------------------------------------- weights


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def break_header(path: Path) -> None:
    flip(path, 20)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("damage", [truncate, break_header, empty])
def test_corrupt_shard(
    tiny_model: Tiny, tmp_path: Path, place: Path, damage: Callable[[Path], None], shards: int
) -> None:
    model = copied(tiny_model("llava", shards=shards), tmp_path)
    shard = sorted(model.glob("*.safetensors"))[-1]
    damage(shard)
    message = fails(*flags(model, place / "out"))
    assert f"the shard {shard} is corrupt" in message
    assert not list(place.iterdir())


def test_missing_shard(tiny_model: Tiny, tmp_path: Path, place: Path) -> None:
    model = copied(tiny_model("llava", shards=3), tmp_path)
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"the shard {shard} is missing" in fails(*flags(model, place / "out"))
    assert not list(place.iterdir())


@pytest.mark.parametrize("name", ["../escaped.safetensors", "/tmp/escaped.safetensors", "a/b.safetensors", ".."])
def test_a_shard_outside_the_directory(tiny_model: Tiny, tmp_path: Path, place: Path, name: str) -> None:
    model = copied(tiny_model("llava", shards=3), tmp_path)
    shutil.copy(sorted(model.glob("*.safetensors"))[0], tmp_path / "escaped.safetensors")
    change_index(model, lambda weight_map: weight_map.update(dict.fromkeys(list(weight_map)[:1], name)))
    message = fails(*flags(model, place / "out"))
    assert repr(name) in message or name in message
    assert not list(place.iterdir())


def test_an_index_that_names_a_tensor_nobody_has(tiny_model: Tiny, tmp_path: Path, place: Path) -> None:
    model = copied(tiny_model("llava", shards=3), tmp_path)
    change_index(model, lambda names: names.update({"extra.weight": "model-00001-of-00004.safetensors"}))
    assert "extra.weight is in model-00001-of-00004.safetensors, and it is not" in fails(*flags(model, place / "out"))
    assert not list(place.iterdir())


def test_an_index_of_nothing(tiny_model: Tiny, probe: Path, tmp_path: Path, place: Path) -> None:
    """Without this, a patched directory without weights would pass the checks of files."""
    model = copied(tiny_model("llava", shards=3), tmp_path)
    change_index(model, lambda names: names.clear())
    fails(*flags(model, place / "out", probe=probe, verify="files"))
    assert not list(place.iterdir())


def change_index(model: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": [1]}', "{}"])
def test_damaged_index(tiny_model: Tiny, tmp_path: Path, place: Path, text: str) -> None:
    model = copied(tiny_model("llava", shards=3), tmp_path)
    (model / "model.safetensors.index.json").write_text(text)
    assert "is not a valid index of shards" in fails(*flags(model, place / "out"))
    assert not list(place.iterdir())


@pytest.mark.parametrize("name", ["pytorch_model.bin", None])
def test_no_safetensors(llava: Path, tmp_path: Path, place: Path, name: str | None) -> None:
    model = copied(llava, tmp_path)
    (model / "model.safetensors").unlink()
    if name is not None:
        torch.save({"lm_head.weight": torch.zeros(2)}, model / name)
    message = fails(*flags(model, place / "out"))
    assert (f"only {name}, a pickle" if name else "has none") in message
    assert "Only safetensors is read" in message
    assert not list(place.iterdir())


def spoil(model: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_nan_in_weights(llava: Path, probe: Path, tmp_path: Path, place: Path) -> None:
    model = copied(llava, tmp_path)

    def change(tensors: dict[str, np.ndarray]) -> None:
        name = next(key for key in tensors if "layers.4.mlp.up_proj" in key)
        tensors[name][3, 5] = np.nan

    spoil(model, change)
    for arguments in (flags(model, place / "out"), flags(model, place / "out", probe=probe)):
        message = fails(*arguments)
        assert "NaN or infinity in model.language_model.layers.4.mlp.up_proj.weight" in message
        assert not list(place.iterdir())


def test_missing_and_mismatched_tensors(llava: Path, tmp_path: Path, place: Path) -> None:
    changes: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
        "lack 1 tensors of the model (model.language_model.layers.": lambda tensors: tensors.pop(
            next(key for key in tensors if "up_proj" in key)
        ),
        "unexpected keys": lambda tensors: tensors.update({"extra.weight": np.zeros(2, np.float32)}),
        "": lambda tensors: tensors.update({key: tensors[key][:-1] for key in tensors if "up_proj" in key}),
    }
    for number, (problem, change) in enumerate(changes.items()):
        model = copied(llava, tmp_path / str(number))
        spoil(model, change)
        assert problem in fails(*flags(model, place / "out"))
        assert not list(place.iterdir())
