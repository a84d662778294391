"""A source model is read as data: no pickle, no code of its own, no file outside its directory, no lie in a header."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner
from records import note
from safetensors.torch import save_file

from sasa_export.cli import main

Tiny = Callable[..., Path]


class Bomb:
    """Whoever unpickles it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


@pytest.fixture
def source(tiny_model: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llava"), tmp_path / "source"))


def patch(source: Path, probe: Path) -> tuple[int, str]:
    """Exit code and last line of a patch without loading the weights; nothing is left behind where it fails."""
    out = source.parent / "place" / "out"
    out.parent.mkdir(exist_ok=True)
    arguments = ["--model", str(source), "--out", str(out), "--probe", str(probe), "--verify", "files"]
    result = CliRunner().invoke(main, arguments)
    assert isinstance(result.exception, SystemExit | None), result.exception
    if result.exit_code:
        assert not list(out.parent.iterdir())
    return result.exit_code, result.stderr.splitlines()[-1]


def refuses(source: Path, probe: Path, what: str, *words: str) -> None:
    code, said = patch(source, probe)
    note("artefact", group="sources", what=what, good=code == 1, tried=1, says=said.replace(str(source.parent), ""))
    assert code == 1 and said.startswith("Error:") and all(word in said for word in words), said


# ------------------------------------------------------------------------------------------------ pickles


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "pytorch_model-00001-of-00002.bin"])
def test_a_pickle_is_refused_and_never_read(source: Path, probe: Path, name: str) -> None:
    mark = source.parent / "mark"
    (source / "model.safetensors").unlink()
    (source / name).write_bytes(pickle.dumps(Bomb(mark)))
    refuses(source, probe, f"weights as {name} alone", name, "a pickle", "Only safetensors is read")
    assert not mark.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "sasa-probe.safetensors"])
def test_a_pickle_under_another_name(source: Path, probe: Path, name: str) -> None:
    mark = source.parent / "mark"
    (source / name).write_bytes(pickle.dumps(Bomb(mark)))
    if name != "model.safetensors":
        (source / "model.safetensors").unlink()
        index = {"weight_map": {"lm_head.weight": name}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(source, probe, f"a pickle named {name}", "corrupt")
    assert not mark.exists()


def test_a_pickle_beside_the_weights_is_left_alone(source: Path, probe: Path) -> None:
    mark = source.parent / "mark"
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    (source / "training_args.bin").write_bytes(pickle.dumps(Bomb(mark)))
    code, said = patch(source, probe)
    out = source.parent / "place" / "out"
    note(
        "artefact",
        group="sources",
        what="pickles beside safetensors",
        good=not code,
        tried=2,
        says="never read, not copied",
    )
    assert code == 0, said
    assert not mark.exists()
    assert not [path for path in out.iterdir() if path.suffix == ".bin"]


# --------------------------------------------------------------------------------------- code and adapters


@pytest.mark.parametrize(
    "name, entry",
    [
        ("config.json", {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}),
        ("config.json", {"AutoProcessor": "evil.Processor"}),
        ("processor_config.json", {"AutoProcessor": "evil.Processor"}),
        ("preprocessor_config.json", {"AutoImageProcessor": "evil.Processor"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Tokenizer", None]}),
    ],
)
def test_code_of_the_source_is_never_run(source: Path, probe: Path, name: str, entry: dict[str, Any]) -> None:
    mark = source.parent / "mark"
    (source / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    path = source / name
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": entry}))
    refuses(source, probe, f"`auto_map` of {next(iter(entry))} in {name}", name, "auto_map", "runs no code of a model")
    assert not mark.exists()


def test_an_adapter_is_not_applied_in_passing(source: Path, probe: Path) -> None:
    """transformers would load it on top of weights that are written without it."""
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "other"}))
    refuses(source, probe, "an adapter in the directory", "adapter_config.json", "merge_and_unload")


# -------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "LICENSE", "folder", "pipe", "loop"]
)
def test_a_link_that_leads_out(source: Path, probe: Path, name: str) -> None:
    """A repository that was cloned can hold links to files of the user's, which a copy would give away."""
    outside = source.parent / "outside"
    outside.mkdir()
    if name == "pipe":
        os.mkfifo(source / name)
    elif name == "loop":
        (source / name).symlink_to(name)
    elif name == "folder":
        (source / name).symlink_to(outside)
    else:
        if (source / name).exists():
            shutil.move(source / name, outside / name)
        else:
            (outside / name).write_text("secret")
        (source / name).symlink_to(outside / name)
    refuses(
        source, probe, f"{name}: a link out of the directory" if name not in ("pipe", "loop") else f"a {name}", name
    )


def test_a_link_within_the_directory(source: Path, probe: Path) -> None:
    shutil.move(source / "model.safetensors", source / "weights.safetensors")
    (source / "model.safetensors").symlink_to("weights.safetensors")
    assert patch(source, probe)[0] == 0


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\0.safetensors", "x.bin"]
)
def test_an_index_that_leads_out(source: Path, probe: Path, name: str) -> None:
    shutil.copyfile(source / "model.safetensors", source.parent / "x.safetensors")
    (source / "model.safetensors").rename(source / "shard.safetensors")
    index = {"weight_map": {"lm_head.weight": name}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(source, probe, f"an index that names {name!r}", repr(name))


# ------------------------------------------------------------------------------------------------ headers


def header(text: bytes, length: int | None = None, data: bytes = b"\0" * 64) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes: Any) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64], **changes}}).encode()


HEADERS = {
    "a header longer than the file": header(entry(), 10**6),
    "a header of 2^63 bytes": header(entry(), 2**63),
    "a header of 2^64 - 1 bytes": header(entry(), 2**64 - 1),
    "a header of 0 bytes": header(b""),
    "seven bytes": b"\1\0\0\0\0\0\0",
    "no JSON": header(b"{{{{"),
    "a list": header(b"[]"),
    "not UTF-8": header(b"\xff\xfe\xfd\xfc"),
    "deep JSON": header(b'{"a":' * 100_000),
    "offsets behind the end": header(entry(data_offsets=[0, 10**9])),
    "offsets that overlap": header(
        json.dumps({name: {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} for name in "ab"}).encode()
    ),
    "offsets in the wrong order": header(entry(data_offsets=[64, 0])),
    "negative offsets": header(entry(data_offsets=[-64, 0])),
    "NaN as an offset": header(entry(data_offsets=[0, float("nan")])),
    "an offset of 2^70": header(entry(data_offsets=[0, 2**70])),
    "a shape that does not fit its bytes": header(entry(shape=[4, 5])),
    "a negative shape": header(entry(shape=[-4, -4])),
    "a shape that overflows": header(entry(shape=[2**40, 2**40])),
    "an unknown type": header(entry(dtype="F31")),
    "a hole between tensors": header(
        json.dumps(
            {
                "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                "b": {"dtype": "F32", "shape": [4], "data_offsets": [48, 64]},
            }
        ).encode()
    ),
    "bytes behind the last tensor": header(entry(shape=[2, 4], data_offsets=[0, 32])),
    "no bytes at all": b"",
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_lies(source: Path, probe: Path, what: str) -> None:
    (source / "model.safetensors").write_bytes(HEADERS[what])
    refuses(source, probe, f"safetensors with {what}", "model.safetensors")


def test_a_probe_whose_header_lies(source: Path, tmp_path: Path) -> None:
    for number, (what, data) in enumerate(HEADERS.items()):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(data)
        code, said = patch(source, path)
        assert code == 1 and path.name in said, (what, said)


def test_a_shape_that_config_json_does_not_say(source: Path, probe: Path) -> None:
    """Seen without loading: the patched model would not load either, and nobody would know before."""
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (source / "config.json").write_text(json.dumps(config))
    refuses(
        source, probe, "shards and config.json that do not belong together", "mlp", "shape", "do not belong together"
    )


def test_a_tensor_that_is_the_guards(source: Path, probe: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "sasa.probe.weight": torch.ones(tiny.HIDDEN)}, source / "model.safetensors")
    refuses(source, probe, "a probe in the source", "sasa.probe.weight")
