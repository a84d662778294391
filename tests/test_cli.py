"""The command line, as a user meets it: exit codes, one-line errors, and what is left on the disk.

The console script runs in a process of its own where its exit code, its signals or its standard error are the
point; elsewhere click's runner calls it in this process, which has torch imported already.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from transformers.utils.logging import disable_progress_bar

from sasa_export import families
from sasa_export.cli import main
from sasa_export.emit import files as emit_files
from sasa_export.emit import staging, weights
from sasa_export.report import Console

SCRIPT = Path(sys.executable).parent / "sasa-export"
FINISHED = 4_194_304  # above the highest process number that Linux gives

Tiny = Callable[..., Path]


# --------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random probe for a tiny model."""
    path = tmp_path_factory.mktemp("probe") / "probe.safetensors"
    return write_probe(path, np.random.default_rng(0).normal(size=tiny.HIDDEN) * 0.2)


@pytest.fixture(scope="session")
def llava(tiny_model: Tiny) -> Path:
    return tiny_model("llava")


@pytest.fixture(scope="session")
def patched(llava: Path, probe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patched llava, verified by its files alone. Tests copy it before they write into it."""
    out = tmp_path_factory.mktemp("patched") / "out"
    succeeds(*flags(llava, out, probe=probe, verify="files"))
    return out


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts that even a random model tells apart: each harmful one ends with a word of its own."""
    folder = tmp_path_factory.mktemp("calibration")
    draw = random.Random(0)
    lines = []
    for pair in range(24):
        words = " ".join(draw.choices(("the", "old", "dog", "house", "water", "red"), k=3 + pair % 4))
        picture = None
        if pair % 2:
            picture = f"{pair}.png"
            tiny.random_image(pair).save(folder / picture)
        for label, word in enumerate(("cake", "broken bridges")):
            record = {"image": picture, "prompt": f"{words} {word}", "label": label, "group": f"pair {pair}"}
            lines.append(json.dumps(record))
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty directory that holds the output and nothing else, so that leftovers beside it show."""
    path = tmp_path / "place"
    path.mkdir()
    return path


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    """In a process of its own the command silences them before transformers is imported."""
    disable_progress_bar()


# ---------------------------------------------------------------------------------------------- helpers


def write_probe(path: Path, weight: Any, bias: float = 0.0) -> Path:
    tensors = {
        "sasa.probe.weight": np.asarray(weight, np.float32),
        "sasa.probe.bias": np.asarray(bias, np.float32),
    }
    save_file(tensors, path)
    return path


def flags(model: Path | str, out: Path, *switches: str, **options: Any) -> list[str]:
    """`--model`, `--out` and other options as arguments; switches such as `--force` stand for themselves."""
    arguments = ["--model", str(model), "--out", str(out), *switches]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    return arguments


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


def succeeds(*arguments: str) -> Any:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result


def fails(*arguments: str) -> str:
    """Run in this process, and return the one-line error."""
    result = invoke(*arguments)
    assert isinstance(result.exception, SystemExit), f"{result.exception!r} was not reported as an error"
    return message_of(result.exit_code, result.stderr)


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *arguments], capture_output=True, text=True, env=offline(**environment), timeout=120
    )


def script_fails(*arguments: str) -> str:
    """Run the console script, and return the one-line error."""
    result = script(*arguments)
    return message_of(result.returncode, result.stderr)


def offline(**environment: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}


def message_of(code: int, stderr: str) -> str:
    """The error, which must be the last line and the only one of its kind, after steps of ours if any."""
    assert code == 1, stderr
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert [line for line in lines if line.startswith("Error:")] == lines[-1:]
    rooms = ("open", "warning", "trace", "load", "calibrate", "rewrite", " ")
    assert all(line.startswith(rooms) for line in lines[:-1]), stderr
    return lines[-1]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, by its path."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def copied(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "copy"))


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


def flip(path: Path, offset: int) -> None:
    """Change one byte; a negative offset counts from the end."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


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


# -------------------------------------------------------------------------------------- the output's place


def test_an_output_that_is_not_empty(llava: Path, probe: Path, place: Path) -> None:
    out = place / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    arguments = flags(llava, out, probe=probe, verify="files")
    message = script_fails(*arguments)
    assert f"{out} is not empty. Give another --out, or --force to replace it" in message
    assert "is not empty" in fails("fetch", *flags(llava, out))
    assert contents(place) == {"out/precious.txt": b"mine"}
    succeeds(*arguments, "--force")
    assert sorted(path.name for path in place.iterdir()) == ["out"]
    assert (out / "sasa-export.json").exists() and not (out / "precious.txt").exists()


def test_an_output_that_is_a_file(llava: Path, probe: Path, place: Path) -> None:
    (place / "out").write_text("mine")
    for switches in ((), ("--force",)):
        arguments = flags(llava, place / "out", *switches, probe=probe, verify="files")
        assert "is a file. Give a directory as --out" in fails(*arguments)
        assert "is a file" in fails("fetch", *flags(llava, place / "out", *switches))
        inside = flags(llava, place / "out" / "inside", *switches, probe=probe, verify="files")
        assert "could not be written" in fails(*inside)
    assert contents(place) == {"out": b"mine"}


def test_an_empty_output_and_missing_parents(llava: Path, probe: Path, place: Path) -> None:
    (place / "out").mkdir()
    succeeds(*flags(llava, place / "out", probe=probe, verify="files"))
    succeeds(*flags(llava, place / "a" / "b" / "out", probe=probe, verify="files"))
    assert sorted(path.name for path in place.iterdir()) == ["a", "out"]
    assert contents(place / "out") == contents(place / "a" / "b" / "out")


def test_a_linked_output_is_replaced_whole(llava: Path, probe: Path, place: Path, tmp_path: Path) -> None:
    """An output that is a symbolic link: no matter what becomes of the link, nothing is left beside it."""
    (tmp_path / "elsewhere").mkdir()
    (place / "out").symlink_to(tmp_path / "elsewhere")
    succeeds(*flags(llava, place / "out", "--force", probe=probe, verify="files"))
    assert [path.name for path in place.iterdir()] == ["out"]


def test_names_with_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets in a path are no markup."""
    console = Console()
    console.step("open", "models[/b]/x[red]: family")
    console.warn("models[/b]/x[red]")
    console.check(True, "a[/i]", "b[dim]")
    printed = capsys.readouterr().err
    assert printed.count("models[/b]/x[red]") == 2
    assert "✓ a[/i]: b[dim]" in printed


# ----------------------------------------------------------------------------------------------- no space


def plenty(path: Any) -> Any:
    return shutil._ntuple_diskusage(10**12, 0, 10**12)


def test_too_little_space(llava: Path, probe: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    little = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: little)
    message = fails(*flags(llava, place / "out", probe=probe, verify="files"))
    assert f"{place} has 0.00 GB free and the patched model needs 0.07 GB" in message
    assert "GB free" in fails("fetch", *flags(llava, place / "out"))
    assert not list(place.iterdir())


def test_a_disk_that_fills_up(llava: Path, probe: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(emit_files.shutil, "copyfile", full)
    message = fails(*flags(llava, place / "out", probe=probe, verify="files"))
    assert "the disk is full" in message and "nothing is left of it" in message
    assert not list(place.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(bytes)`: a new, empty file system of that size. Only root can make one."""
    mounted: list[Path] = []

    def make(size: int) -> Path:
        point = tmp_path / f"disk-{len(mounted)}"
        point.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(point)]
        try:
            done = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            done = False
        if not done:
            pytest.skip("no file system can be mounted here")
        mounted.append(point)
        return point

    yield make
    for point in mounted:
        subprocess.run(["umount", "-l", str(point)], check=True)


def test_a_real_disk_that_fills_up(
    llava: Path, probe: Path, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the space runs out: in the weights, right behind them in the probe, or in a later file."""
    monkeypatch.setattr(shutil, "disk_usage", plenty)
    page = 4096
    weight_pages = -(-(llava / "model.safetensors").stat().st_size // page)
    for pages in (4, weight_pages - 1, weight_pages, weight_pages + 1, weight_pages + 8, weight_pages + 16):
        disk = small_disk(pages * page)
        message = fails(*flags(llava, disk / "out", probe=probe, verify="files"))
        assert "the disk is full" in message, f"with {pages} pages"
        assert not list(disk.iterdir()), f"with {pages} pages"
    disk = small_disk((weight_pages + 60) * page)
    succeeds(*flags(llava, disk / "out", probe=probe, verify="files"))


# ------------------------------------------------------------------------------------------- interruption

# Stops once the weights are written, and waits there for a signal.
SLOW = """
import time
from sasa_export.emit import weights

bring = weights._bring

def slow(*arguments, **options):
    digest = bring(*arguments, **options)
    print("emitting", flush=True)
    time.sleep(60)
    return digest

weights._bring = slow

from sasa_export.cli import main
main(prog_name="sasa-export")
"""


def interrupt(arguments: list[str], number: signal.Signals) -> tuple[int, str]:
    """Send a signal to a run in the middle of writing. Returns its exit code and standard error."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=offline(),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "emitting\n"
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return process.returncode, stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_an_interrupted_run(llava: Path, probe: Path, place: Path, number: signal.Signals) -> None:
    """Nothing appears at --out, and what was there stays; the next run sweeps up after one that was killed."""
    old, new = place / "old", place / "new"
    old.mkdir()
    (old / "precious.txt").write_text("mine")
    # Killed in either place: the sweep goes by the output's name.
    out = new if number == signal.SIGINT else old
    arguments = flags(llava, out, "--force", probe=probe, verify="files")
    code, stderr = interrupt(arguments, number)
    assert code != 0
    assert "Traceback" not in stderr
    assert not new.exists()
    assert contents(old) == {"precious.txt": b"mine"}
    if number != signal.SIGKILL:  # which no program can answer
        assert [path.name for path in place.iterdir()] == ["old"]
    succeeds(*arguments)
    assert {path.name for path in place.iterdir()} == {"old", out.name}
    assert "sasa-export.json" in contents(out) and "precious.txt" not in contents(out)


def test_killed_between_the_two_renames(llava: Path, probe: Path, place: Path) -> None:
    """The old output lies aside, the new one is not in place: the next run puts the old one back first."""
    aside = place / f".out.replaced-{FINISHED}"
    aside.mkdir()
    (aside / "precious.txt").write_text("mine")
    (place / f".out.partial-{FINISHED}").mkdir()
    arguments = flags(llava, place / "out", probe=probe, verify="files")
    assert "is not empty" in fails(*arguments)
    assert contents(place) == {"out/precious.txt": b"mine"}
    succeeds(*arguments, "--force")
    assert [path.name for path in place.iterdir()] == ["out"]


def test_interrupted_between_the_two_renames(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = place / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    rename = os.rename

    def interrupted(source: Path, target: Path) -> None:
        if Path(target) == out and ".partial-" in Path(source).name:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(staging, "exchange", lambda first, second: False)  # as on a file system without it
    monkeypatch.setattr(staging.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), staging.staged(out, force=True) as directory:
        (directory / "new.txt").write_text("new")
    assert contents(place) == {"out/precious.txt": b"mine"}


def test_leftovers_of_a_run_with_this_process_number(place: Path) -> None:
    """In a container every run has the same number, so a leftover may carry this run's own."""
    left = place / f".out.partial-{os.getpid()}"
    left.mkdir()
    (left / "half.txt").write_text("half")
    with staging.staged(place / "out", force=False) as directory:
        (directory / "whole.txt").write_text("whole")
    assert contents(place) == {"out/whole.txt": b"whole"}


def test_the_sweep_leaves_others_alone(place: Path) -> None:
    """Names that only look alike are not this run's leftovers."""
    names = [".out.backup-1", ".out.partial-x", f".other.partial-{FINISHED}", ".out.partial"]
    for name in names:
        (place / name).mkdir()
    with staging.staged(place / "out", force=False):
        pass
    assert {path.name for path in place.iterdir()} == {"out", *names}


# ---------------------------------------------------------------------------------------- fetch and trace


def test_fetch(tiny_model: Tiny, place: Path) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    source = tiny_model("llava", shards=3)
    result = succeeds("fetch", *flags(source, place / "base"))
    assert str(place / "base") in result.stdout
    assert contents(place / "base") == contents(source)
    model, info = LlavaForConditionalGeneration.from_pretrained(place / "base", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = tiny.prompts(
        AutoProcessor.from_pretrained(place / "base"), images=True, count=2, seed=0, padding_side="left"
    )
    assert torch.isfinite(model(**inputs).logits).all()
    succeeds("fetch", *flags(source, place / "base", "--force"))
    assert [path.name for path in place.iterdir()] == ["base"]
    assert "there is no model" in fails("fetch", *flags("no-such-model", place / "other"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_trace(tiny_model: Tiny, family: str) -> None:
    """Every node on a line with its module and inputs, and the decoder drawn before and after."""
    model = tiny_model(family)
    printed = succeeds("trace", "--model", str(model), "--safety-layer", "1", "--semantic-layer", "3").stdout
    listed, before, after = printed.split("```mermaid")
    rows = [line.split() for line in listed.splitlines() if "<-" in line]
    blocks = [f"layers.{index}" for index in range(6)]
    assert [row[0] for row in rows] == ["vision", "projector", "embed", *blocks, "norm", "head"]
    assert [row[1] for row in rows] == ["vision", "projector", "embed", *["block"] * 6, "norm", "head"]
    modules = families.family_of(family).modules
    assert [row[2] for row in rows if row[1] != "block"] == [
        modules[role] for role in ("vision", "projector", "embedding", "norm", "head")
    ]
    assert [row[2] for row in rows if row[1] == "block"] == [f"{modules['blocks']}.{index}" for index in range(6)]
    assert all("attention_mask: " in " ".join(row) for row in rows if row[1] == "block")
    assert "safety layer 1, semantic layer 3 (given by the user)" in listed
    assert before.count("-->") == 5 and '["blocks 0 to 5"]' in before
    for label in ("safety layer 1", "semantic layer 3", "projection", "second lane: blocks 2 to 5", "probe", "gate"):
        assert f'["{label}"]' in after and f'["{label}"]' not in before
    assert "✓" in succeeds("trace", "--model", str(model), "--check").stdout
    assert "✓" in succeeds("trace", "--model", str(model), "--check", "--load").stdout


def test_trace_says_what_the_safety_layer_is_from(llava: Path) -> None:
    assert "scaled by depth from LLaVA-1.5-7B, not measured" in succeeds("trace", "--model", str(llava)).stdout


@pytest.mark.parametrize(
    "role, path, said",
    [
        ("norm", "model.language_model.final_norm", "no module model.language_model.final_norm (norm)"),
        (
            "blocks",
            "model.vision_tower.encoder.layers",
            "model.vision_tower.encoder.layers should be a list of 6 blocks",
        ),
        ("norm", "model.vision_tower.post_layernorm", "model.vision_tower.post_layernorm should run as step 7"),
        ("head", "model.multi_modal_projector.linear_2", "model.multi_modal_projector.linear_2 should run as step 8"),
        ("embedding", "model.vision_tower.embeddings", "model.vision_tower.embeddings should run as step 0"),
        ("projector", "model.connector", "no module model.connector (projector)"),
        ("head", "model.language_model.norm", "model.language_model.norm"),
    ],
)
def test_trace_of_a_model_that_its_family_does_not_describe(
    llava: Path, place: Path, monkeypatch: pytest.MonkeyPatch, role: str, path: str, said: str
) -> None:
    """`trace --check`, `trace` and the patch itself name the node that is not where the file says."""
    from dataclasses import replace

    family = families.families()["llava"]
    changed = replace(family, modules={**family.modules, role: path})
    monkeypatch.setattr(families, "families", lambda: {"llava": changed})
    for arguments in (["trace", "--model", str(llava), "--check"], ["trace", "--model", str(llava)]):
        message = fails(*arguments)
        assert said in message
        assert "graphs/llava.toml" in message or "should be a list" in message
    assert said in fails(*flags(llava, place / "out"))
    assert not list(place.iterdir())


# ------------------------------------------------------------------------------------------------- verify


def test_verify_of_a_good_directory(patched: Path) -> None:
    result = succeeds("verify", str(patched), "--files")
    lines = result.stderr.splitlines()
    assert len(lines) == 5 and all("✓" in line for line in lines)
    assert "files are those that were exported: 12 of 12 by SHA-256" in result.stderr


def test_verify_without_cases_says_so(patched: Path) -> None:
    """A directory written with `--verify files` cannot be verified in full, and that is not silently a pass."""
    result = invoke("verify", str(patched))
    assert result.exit_code == 1
    assert "✗ there are cases to verify" in result.stderr
    assert "Error:" in result.stderr.splitlines()[-1]


def test_verify_of_changed_files(patched: Path, tmp_path: Path) -> None:
    changes: dict[str, Callable[[Path], Any]] = {
        "model-00001-of-00002.safetensors": lambda path: flip(path, -1),
        "model-00002-of-00002.safetensors": lambda path: flip(path, -1),
        "modeling_sasa.py": lambda path: path.write_text(path.read_text() + "\n"),
        "config.json": lambda path: path.write_text(path.read_text() + "\n"),
        "chat_template.jinja": lambda path: path.unlink(),
        "tokenizer.json": lambda path: path.write_text("{}"),
        "extra.txt": lambda path: path.write_text("more"),
    }
    for number, (name, change) in enumerate(changes.items()):
        directory = copied(patched, tmp_path / str(number))
        change(directory / name)
        result = invoke("verify", str(directory), "--files")
        assert result.exit_code == 1, name
        assert f"✗ files are those that were exported: 1 differ: {name}" in result.stderr
        assert "failed its verification" in message_of(1, result.stderr)


@pytest.mark.parametrize(
    "name, text",
    [
        ("sasa-export.json", "{"),
        ("sasa-export.json", "{}"),
        ("sasa-export.json", None),
        ("config.json", "{"),
        ("config.json", "{}"),
        ("modeling_sasa.py", "def ("),
        ("modeling_sasa.py", None),
        ("model.safetensors.index.json", "{"),
        ("model-00002-of-00002.safetensors", "no tensors"),
        ("model-00001-of-00002.safetensors", None),
    ],
)
def test_verify_of_damaged_files(patched: Path, tmp_path: Path, name: str, text: str | None) -> None:
    directory = copied(patched, tmp_path)
    (directory / name).unlink()
    if text is not None:
        (directory / name).write_text(text)
    fails("verify", str(directory), "--files")


def test_verify_of_what_is_no_patched_directory(llava: Path, tmp_path: Path) -> None:
    fails("verify", str(llava), "--files")
    fails("verify", str(tmp_path / "none"), "--files")
    fails("verify", str(tmp_path), "--files")
    (tmp_path / "file").write_text("text")
    fails("verify", str(tmp_path / "file"), "--files")


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
    assert "with projection | picture | 24" in card and "Checked in a fresh process" in card

    again = script("verify", str(out))
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("✓") == 13 and "✗" not in again.stderr

    # The header of a shard, so that the model does not even load: the file is named all the same.
    flip(out / "model-00001-of-00002.safetensors", 20)
    spoiled = invoke("verify", str(out))
    assert spoiled.exit_code == 1
    assert "model-00001-of-00002.safetensors" in spoiled.stderr


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
