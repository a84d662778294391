"""A patched config.json with any change in it: the model does not load, or it keeps its gate.

`SASA_FUZZ=1000` tries so many (`make fuzz`); a few by default.
"""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Guard
from fuzzing import Tries, examples
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText

DELETE = object()
ODD: tuple[Any, ...] = (
    DELETE, None, True, False, 0, -1, 3, 10**12, -0.5, float("nan"), float("inf"), "", "x", "../../x", "llava",
    "LlavaForConditionalGeneration", "\x00", "a\nb", [], [1], {}, {"a": 1},
)  # fmt: skip
changes = st.lists(st.tuples(st.floats(0, 0.9999), st.sampled_from(ODD)), min_size=1, max_size=3)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every entry of a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in entries for found in ((*path, key), *places(item, (*path, key)))]


def changed(document: Any, edits: list[tuple[float, Any]]) -> Any:
    """A copy of a JSON document with some entries deleted or replaced."""
    document = copy.deepcopy(document)
    for share, value in edits:
        paths = places(document)
        *parents, last = paths[int(share * len(paths))]
        parent = document
        for key in parents:
            parent = parent[key]
        if value is DELETE:
            del parent[last]
        else:
            parent[last] = copy.deepcopy(value)
    return document


@pytest.mark.xdist_group("llava")
def test_a_patched_directory_with_changed_settings(guard: Callable[..., Guard], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(guard("llava").directory, tmp_path / "changed"))
    original = json.loads((directory / "config.json").read_text())
    count = Tries("a patched config.json with changed entries")

    @examples(15)
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
