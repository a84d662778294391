"""Configurations and weight files of any kind: an error of one line, or a model that keeps its gate.

`SASA_FUZZ=1000` tries so many of each kind (`make fuzz`); a few by default.
"""

import copy
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Guard
from fuzzing import Tries, examples
from hypothesis import given
from hypothesis import strategies as st
from test_source_files import patch
from transformers import AutoModelForImageTextToText

quick = examples(15)
pytestmark = pytest.mark.xdist_group("llava")

DELETE = object()
ODD: tuple[Any, ...] = (
    DELETE, None, True, False, 0, -1, 3, 10**12, -0.5, float("nan"), float("inf"), "", "x", "../../x", "llava",
    "LlavaForConditionalGeneration", "\x00", "a\nb", [], [1], {}, {"a": 1},
)  # fmt: skip
changes = st.lists(st.tuples(st.floats(0, 0.9999), st.sampled_from(ODD)), min_size=1, max_size=3)
HEADER = struct.Struct("<Q")  # the length of a safetensors header


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every entry of a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, item in entries:
        found += [(*path, key), *places(item, (*path, key))]
    return found


def changed(document: Any, edits: list[tuple[float, Any]]) -> Any:
    """A copy of a JSON document with some entries deleted or replaced."""
    document = json.loads(json.dumps(document))
    for share, value in edits:
        paths = places(document)
        if not paths:
            break
        *parents, last = paths[int(share * len(paths))]
        parent = document
        for key in parents:
            parent = parent[key]
        if value is DELETE:
            del parent[last]
        else:
            parent[last] = copy.deepcopy(value)
    return document


def ends_well(source: Path, probe: Path) -> None:
    """A patch of the source succeeds, or says why not in one line, and leaves nothing behind."""
    code, said = patch(source, probe)
    assert code == 0 or (code in (1, 2) and said.startswith("Error:")), said
    shutil.rmtree(source.parent / "place")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json"]
)
def test_a_source_with_changed_settings(tiny_model: Any, tmp_path: Path, probe: Path, name: str) -> None:
    source = Path(shutil.copytree(tiny_model("llava"), tmp_path / "source"))
    original, count = json.loads((source / name).read_text()), Tries(f"a source's {name} with changed entries")

    @quick
    @given(changes)
    def run(edits: list[tuple[float, Any]]) -> None:
        count()
        (source / name).write_text(json.dumps(changed(original, edits)))
        ends_well(source, probe)

    run()
    count.passed()


def test_a_source_with_a_changed_header(tiny_model: Any, tmp_path: Path, probe: Path) -> None:
    source = Path(shutil.copytree(tiny_model("llava"), tmp_path / "source"))
    path, count = source / "model.safetensors", Tries("a source's safetensors header with changed entries")
    content = path.read_bytes()
    (length,) = HEADER.unpack(content[: HEADER.size])
    header, weights = json.loads(content[HEADER.size : HEADER.size + length]), content[HEADER.size + length :]

    @quick
    @given(changes)
    def run(edits: list[tuple[float, Any]]) -> None:
        count()
        written = json.dumps(changed(header, edits)).encode()
        path.write_bytes(HEADER.pack(len(written)) + written + weights)
        ends_well(source, probe)

    run()
    count.passed()


def test_a_source_with_changed_bytes(tiny_model: Any, tmp_path: Path, probe: Path) -> None:
    source = Path(shutil.copytree(tiny_model("llava"), tmp_path / "source"))
    path, count = source / "model.safetensors", Tries("a source's safetensors file with changed bytes, or cut")
    content = path.read_bytes()
    (length,) = HEADER.unpack(content[: HEADER.size])

    @quick
    @given(st.lists(st.tuples(st.floats(0, 0.9999), st.binary(max_size=9)), max_size=3), st.none() | st.floats(0, 1))
    def run(edits: list[tuple[float, bytes]], cut: float | None) -> None:
        count()
        found = bytearray(content)
        for share, more in edits:
            place = int(share * (HEADER.size + length))
            found[place : place + len(more)] = more
        path.write_bytes(found if cut is None else found[: int(cut * len(found))])
        ends_well(source, probe)

    run()
    count.passed()


def test_a_patched_directory_with_changed_settings(guard: Callable[..., Guard], tmp_path: Path) -> None:
    """It fails to load, or has the gate and the settings that were written."""
    directory = Path(shutil.copytree(guard("llava").directory, tmp_path / "changed"))
    original = json.loads((directory / "config.json").read_text())
    count = Tries("a patched config.json with changed entries")

    @quick
    @given(changes)
    def run(edits: list[tuple[float, Any]]) -> None:
        count()
        (directory / "config.json").write_text(json.dumps(changed(original, edits)))
        try:
            model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True)
        except Exception:  # transformers' own checks of a configuration raise all kinds
            return
        assert hasattr(model, "_sasa_forward"), "a model was loaded without its gate"
        kept = {name: value for name, value in model.config.sasa.items() if name != "sha256"}
        assert kept == {name: value for name, value in original["sasa"].items() if name != "sha256"}
        assert model.sasa.probe.weight.isfinite().all() and model.sasa.probe.weight.any()

    run()
    count.passed()
