"""The ways in which a data set is broken: the error names the file and the record, in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import miniature
import pytest

from sasa_export.errors import DataError
from sasa_export.prompts import load

Break = Callable[[Path], Any]

FRAUD = "data/processed_questions/06-Fraud.json"
FULL = "data/question/safebench.csv"
GUARD = "test.json"
BREAK_V = "JailBreakV_28K/JailBreakV_28K.csv"
LINES = "prompts.jsonl"
TEST = "harmbench_behaviors_text_test.csv"


def swap(name: str, old: str, new: str) -> Break:
    """Replace the first `old` in a file, which must be there."""

    def apply(root: Path) -> None:
        text = (root / name).read_text(encoding="utf-8")
        assert old in text
        (root / name).write_text(text.replace(old, new, 1), encoding="utf-8")

    return apply


def put(name: str, content: bytes) -> Break:
    return lambda root: (root / name).write_bytes(content)


def remove(name: str) -> Break:
    return lambda root: (root / name).unlink()


def cut(name: str) -> Break:
    """Leave the first half of a file, as an interrupted download does."""
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[: (root / name).stat().st_size // 2])


def entry(name: str, key: Any, field: str, *value: Any) -> Break:
    """Set a field of one entry in a JSON file, or delete it without a value."""

    def apply(root: Path) -> None:
        found = json.loads((root / name).read_text())
        if value:
            found[key][field] = value[0]
        else:
            del found[key][field]
        (root / name).write_text(json.dumps(found))

    return apply


def complaint(whole: dict[str, Path], tmp_path: Path, name: str, apply: Break) -> tuple[str, Path]:
    """What loading a broken copy complains about, and where the copy lies."""
    own = name == "jsonl"  # which is named by a file
    root = shutil.copytree(whole[name].parent if own else whole[name], tmp_path / name)
    apply(root)
    with pytest.raises(DataError) as caught:
        load(f"{name}:{root / LINES if own else root}")
    said = str(caught.value)
    assert said.isprintable()
    return said, root


BROKEN: dict[str, list[tuple[Break, str]]] = {
    "mm-safetybench": [
        (remove(FRAUD), f"there is no file {{root}}/{FRAUD}"),
        (cut(FRAUD), f"{{root}}/{FRAUD} is not valid JSON"),
        (put(FRAUD, b"[1, 2]"), f"{{root}}/{FRAUD}, record 1 is no record with names"),
        (put(FRAUD, b"[" * 100_000), f"{{root}}/{FRAUD} is not valid JSON"),
        (put(FRAUD, '{"0": "é"}'.encode("latin-1")), f"{{root}}/{FRAUD} cannot be read as text"),
        (put(FRAUD, b"7"), f"{{root}}/{FRAUD} holds neither a list of records nor"),
        (entry(FRAUD, "1", "Question", " \n"), "record '1' has no text 'Question'"),
        (entry(FRAUD, "1", "Rephrased Question", []), "record '1' has a 'Rephrased Question' that is not"),
    ],
    "figstep": [
        (put(FULL, b""), "{root} has no prompts"),
        (swap(FULL, "question", "what"), f"{FULL}, record 1 has no text 'question'"),
        (swap(FULL, "ForbidQI,9,2", "ForbidQI,9,1"), "has the id 'full/9_1/figstep' twice"),
        (swap(FULL, "ForbidQI,9,1", "a,b,ForbidQI,9,1"), f"{FULL}, record 3 has more or fewer fields"),
        (swap(FULL, "ForbidQI,9,2,", "ForbidQI,9,2\n"), f"{FULL}, record 4 has more or fewer fields"),
        (swap(FULL, "ForbidQI,9,2", '"ForbidQI,9,2'), f"{{root}}/{FULL} is not valid CSV"),
    ],
    "vlguard": [
        (entry(GUARD, 1, "safe", "yes"), f"{GUARD}, record 2 ('Ads_1') has 'yes' as 'safe'; it must be one of false"),
        (entry(GUARD, 1, "instr-resp"), f"{GUARD}, record 2 ('Ads_1') has no text 'instr-resp.safe_instruction'"),
        (entry(GUARD, 1, "image", "a\n\0" + "b" * 300), "('Ads_1') names the image"),
    ],
    "jailbreakv": [
        (remove(BREAK_V), "there is no file {root}/JailBreakV_28K/JailBreakV_28K.csv"),
        (swap(BREAK_V, "Logic", "Poem"), f"{BREAK_V}, record 3 has 'Poem' as 'format'; it must be one of template"),
    ],
    "jsonl": [
        (put(LINES, b"\xff\xfe"), f"{{root}}/{LINES} cannot be read"),
        (cut(LINES), "is not valid JSON"),
        (put(LINES, b"[]"), f"{LINES}, line 1 is no record with names"),
        (swap(LINES, "How do I bake 0?", " "), f"{LINES}, line 1 has an empty prompt and no image"),
        (swap(LINES, '"label": 1', '"label": 2'), f"{LINES}, line 2 has the label 2; it must be 0 (harmless)"),
        (swap(LINES, '"label": 1', '"label": [1]'), f"{LINES}, line 2 has the label [1]"),
        (swap(LINES, '"label": 1', '"id": 1'), f"{LINES}, line 2 has the label None"),
        (swap(LINES, '"pictures/1.png"', "[1]"), f"{LINES}, line 3 has a 'image' that is not a text"),
        (swap(LINES, '"image"', '"img"'), f"{LINES}, line 1 has the unknown key 'img'. Did you mean 'image'?"),
        (swap(LINES, '"label": 1', '"label": 1, "x": 2'), "line 2 has the unknown key 'x'. Known are image,"),
        (swap(LINES, "How do I", "<image> How do I"), f"{LINES}, line 1 has <image> 1 times in its prompt and no"),
        (swap(LINES, '"label": 1', '"id": "line 1", "label": 1'), f"{LINES} has the id 'line 1' twice"),
        (remove("pictures/1.png"), "line 3 names the image {root}/pictures/1.png, which does not exist"),
    ],
    "harmbench": [
        (swap(TEST, "standard", "odd"), f"{TEST}, record 1 has 'odd' as 'FunctionalCategory'; it must be one"),
    ],
}


@pytest.mark.parametrize(("name", "apply", "said"), [(name, *case) for name, cases in BROKEN.items() for case in cases])
def test_broken(whole: dict[str, Path], tmp_path: Path, name: str, apply: Break, said: str) -> None:
    found, root = complaint(whole, tmp_path, name, apply)
    assert said.replace("{root}", str(root)) in found


@pytest.mark.parametrize("way", ["text", "cut off", "EPS", "ICO"])
def test_a_picture_that_cannot_be_read(whole: dict[str, Path], tmp_path: Path, way: str) -> None:
    """Pillow reads many formats, and starts a program for some: those that are allowed are named."""
    file = "pictures/1.png"

    def in_another_format(root: Path) -> None:
        miniature.picture(root / f"other.{way.lower()}", 0).rename(root / file)

    ways = {"text": put(file, b"text"), "cut off": cut(file)}
    found, root = complaint(whole, tmp_path, "jsonl", ways.get(way, in_another_format))
    assert f"line 3 names the image {root / file}, which cannot be read" in found
    assert "Give it as PNG, JPEG, WEBP" in found
