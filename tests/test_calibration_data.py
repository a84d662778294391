"""Prompts to calibrate on: JSONL files and the built-in set."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sasa_export.errors import CalibrationError
from sasa_export.probe import data
from sasa_export.prompts.prompt import Prompt, builtin, from_jsonl

# -------------------------------------------------------------------------------------------- JSONL files


def line(**fields: Any) -> str:
    return json.dumps({"image": None, "prompt": "the old house", "label": 0, **fields}, ensure_ascii=False)


def ten(*more: str) -> str:
    return "\n".join([*(line(label=number % 2) for number in range(10)), *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from([0, 1, "a.png"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=6,
)
records = st.dictionaries(
    st.sampled_from(["image", "prompt", "label", "group", "category", "other"]), json_values, max_size=6
)
garbage = st.one_of(
    st.text(),
    records.map(json.dumps),
    records.map(lambda fields: line(**fields)),
    st.sampled_from([line(image="a\0b"), line(image="\ud800"), line(prompt="\ud800"), "NaN", "\ufeff{}"]),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(garbage, max_size=4))
def test_garbage_is_a_calibration_error(folder: Path, lines: list[str]) -> None:
    """Whatever stands in the file, it is read as prompts or refused in one line that names the file."""
    path = folder / "garbage.jsonl"
    path.write_text(ten(*lines), encoding="utf-8", errors="surrogatepass")
    try:
        prompts = from_jsonl(path)
    except CalibrationError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert {prompt.label for prompt in prompts} == {0, 1}
        assert all(type(prompt.label) is int and isinstance(prompt.group, str) for prompt in prompts)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_are_a_calibration_error(folder: Path, content: bytes) -> None:
    path = folder / "bytes.jsonl"
    path.write_bytes(content)
    with pytest.raises(CalibrationError):
        from_jsonl(path)


def test_what_a_line_says(folder: Path) -> None:
    (folder / "pictures").mkdir()
    tiny.random_image(1).save(folder / "pictures" / "a.png")
    tiny.random_image(2).convert("L").save(folder / "grey.png")
    path = folder / "prompts.jsonl"
    more = [
        line(image="pictures/a.png", prompt="", label=1, group="g", category="c"),
        "",
        line(image=str(folder / "grey.png"), label=0, extra=[1]),
        json.dumps({"prompt": "no image named", "label": 1}),
    ]
    path.write_text(ten(*more) + "\n\n")
    prompts = from_jsonl(path)
    assert len(prompts) == 13
    picture, grey, last = prompts[10:]
    assert (picture.label, picture.group, picture.channel, picture.category) == (1, "g", "picture", "c")
    assert picture.image is not None and picture.image().tobytes() == tiny.random_image(1).tobytes()
    assert picture.conversation()[0]["content"][0]["type"] == "image"
    assert grey.image is not None and grey.image().mode == "RGB"
    assert (grey.name, last.name) == ("line 13", "line 14")
    assert last.conversation() == [{"role": "user", "content": [{"type": "text", "text": "no image named"}]}]
    assert len({prompt.group for prompt in prompts}) == 13


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_newline_ends_a_line(folder: Path, separator: str) -> None:
    """JSON strings may hold Unicode's other line separators as they are, some writers leave them so."""
    path = folder / "separators.jsonl"
    text = f"the old{separator}house"
    # Control characters below U+0020 have to be escaped in JSON; U+0085 and above need not.
    written = (
        f'{{"prompt": "{text}", "label": 1}}' if ord(separator) > 0x1F else json.dumps({"prompt": text, "label": 1})
    )
    path.write_text(ten(written), encoding="utf-8", newline="\n")
    assert from_jsonl(path)[-1].prompt == text


def test_windows_line_ends_and_marks(folder: Path) -> None:
    path = folder / "windows.jsonl"
    path.write_bytes(ten().replace("\n", "\r\n").encode())
    assert len(from_jsonl(path)) == 10


# ------------------------------------------------------------------------------------------ the built-in set


def digest(prompts: list[Prompt], rows: range) -> str:
    """SHA-256 over texts and pictures."""
    found = hashlib.sha256()
    for row in rows:
        found.update(prompts[row].prompt.encode())
        image = prompts[row].image
        if image is not None:
            found.update(image().tobytes())
    return found.hexdigest()


SOME = range(0, 400, 7)


def test_the_builtin_set_has_both_channels() -> None:
    prompts = builtin(None)
    pairs = len(Path(data.__file__).with_name("builtin.jsonl").read_text().splitlines())
    assert pairs >= 240 and len(prompts) == 4 * pairs >= 960
    assert len({prompt.name for prompt in prompts}) == len(prompts)
    for channel in ("text", "picture"):
        for label in (0, 1):
            found = [prompt for prompt in prompts if (prompt.channel, prompt.label) == (channel, label)]
            assert len(found) == pairs
            assert len({prompt.group for prompt in found}) == pairs
            assert all((prompt.image is None) == (channel == "text") for prompt in found)
    carriers = {prompt.prompt for prompt in prompts if prompt.channel == "picture"}
    assert carriers == set(data.CARRIERS)
    # The words beside a picture do not tell what is in it.
    for carrier in carriers:
        labels = [prompt.label for prompt in prompts if prompt.prompt == carrier]
        assert 0.4 < np.mean(labels) < 0.6


def test_the_pictures_are_deterministic() -> None:
    """Here, and in another process."""
    expected = digest(builtin(None), SOME)
    assert digest(builtin(None), SOME) == expected
    code = (
        "import hashlib\nfrom sasa_export.prompts.prompt import builtin\n"
        f"found, prompts = hashlib.sha256(), builtin(None)\n"
        f"for row in {SOME}:\n"
        "    found.update(prompts[row].prompt.encode())\n"
        "    found.update(prompts[row].image().tobytes() if prompts[row].image else b'')\n"
        "print(found.hexdigest())"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.split()[-1] == expected


@pytest.mark.parametrize("pieces", [lambda word: (len(word) + 1) // 2, len], ids=["pairs of letters", "letters"])
def test_every_request_fits_its_picture(pieces: Callable[[str], int]) -> None:
    """Whatever a tokenizer makes of the words: one that knows no English makes a token of each letter."""
    for prompt in builtin(pieces):
        if prompt.image is not None:
            picture = prompt.image()
            assert picture.mode == "RGB" and min(picture.size) > 0
