"""Calibration files of any kind: prompts, or an error of one line that names the file, never a traceback.

`SASA_FUZZ=1000` tries so many of each kind (`make fuzz`); a few by default.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from records import note

from sasa_export.errors import SasaExportError
from sasa_export.probe.features import batches
from sasa_export.prompts import calibration_prompts
from sasa_export.prompts.prompt import Prompt

quick = examples(40)

# Whatever JSON can say, and what Python's reader takes beside it.
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PICTURES = ("whole.png", "whole.jpg", "torn.png", "empty.png", "text.png", "bomb.png", "loop.png", ".", "no.png")
images = st.none() | st.sampled_from(PICTURES) | st.text(max_size=12)
FIELDS = ("prompt", "label", "image", "group", "id", "category", "attack", "question")
good = st.fixed_dictionaries(
    {"prompt": st.text(min_size=1, max_size=30), "label": st.sampled_from([0, 1]), "image": images},
    optional={name: st.text(max_size=8) for name in FIELDS[3:]},
)
odd = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), values, max_size=6)
EDGES = (
    "", "   ", "{}", "[]", "null", "{", '{"prompt": "a", "label": 1', "NaN", "\x00", '"\ud800"', "\ufeff{}",
    "[" * 100_000, '{"label": ' + "9" * 5000 + "}", '{"prompt": "a", "prompt": "b", "label": 1, "image": null}',
    '{"prompt": "\\ud800", "label": 1, "image": null}', '{"prompt": "a", "label": 1e0, "image": null}',
    '{"prompt": "a", "label": true, "image": null}', '{"prompt": "a\\u0000b", "label": 1, "image": "\\u0000"}',
    '{"prompt": "' + "long " * 100_000 + '", "label": 0, "image": null}', "\r", "\x0b", "\x85", "\u2028",
)  # fmt: skip
lines = st.one_of(good.map(json.dumps), odd.map(json.dumps), values.map(json.dumps), st.sampled_from(EDGES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, whole and broken."""
    path = tmp_path_factory.mktemp("fuzz")
    picture = tiny.random_image(0)
    picture.save(path / "whole.png")
    picture.save(path / "whole.jpg")
    (path / "torn.png").write_bytes((path / "whole.png").read_bytes()[:60])
    (path / "empty.png").touch()
    (path / "text.png").write_text("%!PS-Adobe-3.0\n")
    data = bytearray((path / "whole.png").read_bytes())
    data[16:24] = (1 << 30).to_bytes(4, "big") * 2  # a size that no memory holds
    (path / "bomb.png").write_bytes(data)
    (path / "loop.png").symlink_to("loop.png")
    return path


def read(path: Path) -> list[Prompt]:
    """What calibration does with a file before a model is asked: read it, cut batches, decode the pictures."""
    prompts = calibration_prompts([str(path)])
    for batch in batches(prompts, 4):
        for row in batch:
            assert prompts[row].conversation()[0]["role"] == "user"
    return prompts


def tried(path: Path) -> str:
    """Read a file. Returns what it was, or asserts that the error is one of ours, in one line."""
    try:
        prompts = read(path)
    except SasaExportError as error:
        message = str(error)
        assert message and message.isprintable(), repr(message)
        return "refused"
    labels = [prompt.label for prompt in prompts]
    assert min(labels.count(0), labels.count(1)) >= 5 and len({prompt.name for prompt in prompts}) == len(prompts)
    return "taken"


def enough() -> list[dict[str, Any]]:
    """Ten prompts that calibration takes."""
    return [{"prompt": f"please tell me {number}", "label": number % 2, "image": None} for number in range(10)]


def noted(what: str, count: dict[str, int]) -> None:
    note("faults", group="fuzzing", what=what, tried=sum(count.values()), of=None, good=True)


def test_lines_of_any_kind(folder: Path) -> None:
    """Files of which some lines are good and some are not."""
    count = {"taken": 0, "refused": 0}

    @quick
    @given(st.lists(lines, max_size=5), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n", "\r"]))
    def run(more: list[str], whole: bool, end: str) -> None:
        path = folder / "prompts.jsonl"
        written = [*map(json.dumps, enough() if whole else []), *more]
        path.write_bytes(end.join(written).encode("utf-8", "surrogatepass"))
        count[tried(path)] += 1

    run()
    assert min(count.values()) > 0, count
    noted("calibration files of odd lines", count)


def test_good_lines_with_any_picture(folder: Path) -> None:
    count = {"taken": 0, "refused": 0}

    @quick
    @given(st.lists(good, max_size=3))
    def run(more: list[dict[str, Any]]) -> None:
        path = folder / "pictures.jsonl"
        path.write_text("\n".join(json.dumps(line) for line in [*enough(), *more]), encoding="utf-8")
        count[tried(path)] += 1

    run()
    assert min(count.values()) > 0, count
    noted("calibration files with odd pictures", count)


def test_bytes_of_any_kind(folder: Path) -> None:
    """A good file with bytes changed, cut off, or put in; and no file at all."""
    start = "\n".join(json.dumps(line) for line in enough()).encode()
    count = {"taken": 0, "refused": 0}

    @quick
    @given(st.integers(0, len(start)), st.integers(0, 40), st.binary(max_size=40))
    def run(place: int, dropped: int, more: bytes) -> None:
        path = folder / "bytes.jsonl"
        path.write_bytes(start[:place] + more + start[place + dropped :])
        count[tried(path)] += 1

    run()
    noted("calibration files with changed bytes", count)


@pytest.mark.parametrize(
    "name", ["", " ", ".", "no.jsonl", "loop.png", "a\0b", "a\nb", "x" * 5000, "whole.png", "\udc80"]
)
def test_names_of_any_kind(folder: Path, name: str) -> None:
    """What is no file of prompts."""
    for spec in (str(folder / name), name, f"jsonl:{folder / name}"):
        with pytest.raises(SasaExportError) as caught:
            calibration_prompts([spec])
        assert str(caught.value).isprintable(), repr(str(caught.value))


def test_specs_of_any_kind(folder: Path) -> None:
    """`name:PATH,option=value` of any spelling."""
    count = {"taken": 0, "refused": 0}
    names = st.sampled_from(["jsonl", "figstep", "mm-safetybench", "vlguard", "jailbreakv", "xstest", "no-set"])
    options = st.text(alphabet="abc=+,:/_- \n\0", max_size=12) | st.sampled_from(
        [",subset=safe", ",variant=SD+TYPO", ",part=tiny", ",split=train,split=test", ",mini=yes", ",format=", ",=x"]
    )

    @quick
    @given(names, st.sampled_from(["", ".", "/", "pictures.jsonl", "~", "~nobody/x", str(folder)]), options)
    def run(name: str, path: str, tail: str) -> None:
        try:
            calibration_prompts([f"{name}:{path}{tail}"])
            count["taken"] += 1
        except SasaExportError as error:
            assert str(error).isprintable(), repr(str(error))
            count["refused"] += 1

    run()
    noted("names of data sets", count)
