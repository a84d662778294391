"""A source model is read as data: no pickle, no code of its own, no file outside its directory."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_steps import copied, fails, flags, succeeds


class Bomb:
    """Whoever unpickles it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


@pytest.fixture
def source(llava: Path, tmp_path: Path) -> Path:
    return copied(llava, tmp_path)


def refuses(source: Path, probe: Path, place: Path, *words: str) -> None:
    """A patch that loads no weights fails, says why in one line, runs nothing (no mark) and leaves nothing behind."""
    said = fails(*flags(source, place / "out", probe=probe, verify="files"))
    assert all(word in said for word in words), said
    assert not (source.parent / "mark").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin"])
def test_a_pickle_is_refused_and_never_read(source: Path, probe: Path, place: Path, name: str) -> None:
    (source / "model.safetensors").unlink()
    (source / name).write_bytes(pickle.dumps(Bomb(source.parent / "mark")))
    refuses(source, probe, place, name, "a pickle", "Only safetensors is read")


def test_a_pickle_under_another_name(source: Path, probe: Path, place: Path) -> None:
    (source / "model.safetensors").write_bytes(pickle.dumps(Bomb(source.parent / "mark")))
    refuses(source, probe, place, "corrupt")


def test_a_pickle_beside_the_weights_is_left_alone(source: Path, probe: Path, place: Path) -> None:
    (source / "training_args.bin").write_bytes(pickle.dumps(Bomb(source.parent / "mark")))
    succeeds(*flags(source, place / "out", probe=probe, verify="files"))
    assert not (source.parent / "mark").exists() and not list((place / "out").glob("*.bin"))


@pytest.mark.parametrize(
    "name, entry",
    [
        ("config.json", {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}),
        ("processor_config.json", {"AutoProcessor": "evil.Processor"}),
        ("preprocessor_config.json", {"AutoImageProcessor": "evil.Processor"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Tokenizer", None]}),
    ],
)
def test_code_of_the_source_is_never_run(
    source: Path, probe: Path, place: Path, name: str, entry: dict[str, Any]
) -> None:
    (source / "evil.py").write_text(f"import os\nos.mkdir({str(source.parent / 'mark')!r})\n")
    path = source / name
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": entry}))
    refuses(source, probe, place, name, "runs no code of a model")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("generation_config.json", "{", "is not valid JSON"),  # it says which tokens end an answer
        # transformers would load it on top of weights that are written without it.
        ("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "other"}', "merge_and_unload"),
    ],
)
def test_a_file_that_would_change_the_model(
    source: Path, probe: Path, place: Path, name: str, text: str, said: str
) -> None:
    (source / name).write_text(text)
    refuses(source, probe, place, name, said)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "LICENSE", "folder"])
def test_a_link_that_leads_out(source: Path, probe: Path, place: Path, name: str) -> None:
    """A repository that was cloned can hold links to files of the user's, which a copy would give away."""
    outside = source.parent / "outside"
    outside.mkdir()
    if (source / name).exists():
        shutil.move(source / name, outside / name)
    else:
        (outside / name).write_text("secret")
    (source / name).symlink_to(outside / name)
    refuses(source, probe, place, name)


def test_a_link_within_the_directory(source: Path, probe: Path, place: Path) -> None:
    shutil.move(source / "model.safetensors", source / "weights.safetensors")
    (source / "model.safetensors").symlink_to("weights.safetensors")
    succeeds(*flags(source, place / "out", probe=probe, verify="files"))
