"""The ways in which a data set is broken: the error names the file and the record, in one line."""

from __future__ import annotations

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
XSTEST = "xstest_prompts.csv"
LINES = "prompts.jsonl"
GOALS = "harmful_behaviors.csv"
TEST = "harmbench_behaviors_text_test.csv"
WRITING = "benchmark_all.jsonl"
FILES = {"jsonl": LINES, "table": "own.csv"}  # data sets that are named by a file
PICTURES = {  # one of each data set
    "mm-safetybench": "data/imgs/06-Fraud/SD_TYPO/1.jpg",
    "figstep": "data/images/SafeBench/query_ForbidQI_9_1_6.png",
    "vlguard": "test/bad_ads/1.png",
    "jailbreakv": "JailBreakV_28K/figstep/figstep_4.png",
    "jsonl": "pictures/1.png",
}


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
    source = whole[name].parent if name in FILES else whole[name]
    root = shutil.copytree(source, tmp_path / name)
    apply(root)
    with pytest.raises(DataError) as caught:
        load(f"{name}:{root / FILES.get(name, '')}")
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
        (put(FRAUD, b'{"1": 3}'), f"{FRAUD}, record '1' is no record with names"),
        (entry(FRAUD, "1", "Question"), "record '1' has no text 'Question'"),
        (entry(FRAUD, "1", "Question", " \n"), "record '1' has no text 'Question'"),
        (entry(FRAUD, "1", "Rephrased Question", []), "record '1' has a 'Rephrased Question' that is not"),
    ],
    "figstep": [
        (remove(FULL), f"there is no file {{root}}/{FULL}"),
        (put(FULL, b""), "{root} has no prompts"),
        (put(FULL, b"dataset,question\n"), "{root} has no prompts"),
        (swap(FULL, "question", "what"), f"{FULL}, record 1 has no text 'question'"),
        (swap(FULL, "ForbidQI,9,2", "ForbidQI,9,1"), "has the id 'full/9_1/figstep' twice"),
        (swap(FULL, "9,1,Financial Advice", "9,1,"), f"{FULL}, record 3 has no text 'category_name'"),
        (swap(FULL, "ForbidQI,9,1", "a,b,ForbidQI,9,1"), f"{FULL}, record 3 has more or fewer fields"),
        (swap(FULL, "ForbidQI,9,2,", "ForbidQI,9,2\n"), f"{FULL}, record 4 has more or fewer fields"),
        (swap(FULL, "ForbidQI,9,2", '"ForbidQI,9,2'), f"{{root}}/{FULL} is not valid CSV"),
    ],
    "vlguard": [
        (cut(GUARD), f"{{root}}/{GUARD} is not valid JSON"),
        (put(GUARD, b"7"), f"{{root}}/{GUARD} holds neither a list of records nor"),
        (put(GUARD, b"[]"), "{root} has no prompts"),
        (put(GUARD, b'["x"]'), f"{GUARD}, record 1 is no record with names"),
        (entry(GUARD, 2, "id", "Ads_1"), "has the id 'test/Ads_1/safe_safes' twice"),
        (entry(GUARD, 1, "safe", "yes"), f"{GUARD}, record 2 ('Ads_1') has 'yes' as 'safe'; it must be one of false"),
        (entry(GUARD, 0, "harmful_category"), "('PrivacyAlert_test_1') has no text 'harmful_category'"),
        (entry(GUARD, 1, "instr-resp"), f"{GUARD}, record 2 ('Ads_1') has no text 'instr-resp.safe_instruction'"),
        (entry(GUARD, 1, "image"), f"{GUARD}, record 2 ('Ads_1') has no text 'image'"),
        (entry(GUARD, 1, "image", "a\n\0" + "b" * 300), "('Ads_1') names the image"),
    ],
    "jailbreakv": [
        (remove(BREAK_V), "there is no file {root}/JailBreakV_28K/JailBreakV_28K.csv"),
        (swap(BREAK_V, "redteam_query", "query"), f"{BREAK_V}, record 1 has no text 'redteam_query'"),
        (swap(BREAK_V, "Logic", "Poem"), f"{BREAK_V}, record 3 has 'Poem' as 'format'; it must be one of template"),
    ],
    "xstest": [
        (remove(XSTEST), f"there is no file {{root}}/{XSTEST}"),
        (swap(XSTEST, "id,", "number,"), f"{XSTEST}, record 1 has no text 'id'"),
        (swap(XSTEST, "How do I kill a man?", " "), f"{XSTEST}, record 3 has no text 'prompt'"),
    ],
    "jsonl": [
        (remove(LINES), f"there is no data file or directory {{root}}/{LINES}. Check --data"),
        (put(LINES, b"\n"), f"{{root}}/{LINES} has no prompts"),
        (put(LINES, b"\xff\xfe"), f"{{root}}/{LINES} cannot be read"),
        (cut(LINES), "is not valid JSON"),
        (put(LINES, b"[]"), f"{LINES}, line 1 is no record with names"),
        (put(LINES, b"[" * 100_000), f"{LINES}, line 1 is not valid JSON"),
        (swap(LINES, "How do I bake 0?", " "), f"{LINES}, line 1 has an empty prompt and no image"),
        (swap(LINES, '"label": 1', '"label": 2'), f"{LINES}, line 2 has the label 2; it must be 0 (harmless)"),
        (swap(LINES, '"label": 1', '"label": [1]'), f"{LINES}, line 2 has the label [1]"),
        (swap(LINES, '"label": 1', '"id": 1'), f"{LINES}, line 2 has the label None"),
        (swap(LINES, '"pictures/1.png"', "[1]"), f"{LINES}, line 3 has a 'image' that is not a text"),
        (swap(LINES, '"label": 1', '"question": [], "label": 1'), "line 2 has a 'question' that is not a text"),
        (swap(LINES, '"image"', '"images"'), f"{LINES}, line 1 has the unknown key 'images'. Did you mean 'image'?"),
        (swap(LINES, '"image"', '"img"'), f"{LINES}, line 1 has the unknown key 'img'. Did you mean 'image'?"),
        (swap(LINES, '"label": 1', '"label": 1, "x": 2'), "line 2 has the unknown key 'x'. Known are image,"),
        (swap(LINES, "How do I", "<image> How do I"), f"{LINES}, line 1 has <image> 1 times in its prompt and no"),
        (swap(LINES, '"label": 1', '"id": "line 1", "label": 1'), f"{LINES} has the id 'line 1' twice"),
    ],
    "advbench": [
        (swap(GOALS, "goal", "aim"), f"{GOALS}, record 1 has no text 'value'"),
    ],
    "harmbench": [
        (remove(TEST), f"there is no file {{root}}/{TEST}"),
        (swap(TEST, "standard", "odd"), f"{TEST}, record 1 has 'odd' as 'FunctionalCategory'; it must be one"),
    ],
    "writingbench": [
        (cut(WRITING), f"{WRITING}, line 3 is not valid JSON"),
        (swap(WRITING, '"query": "W', '"q": "W'), f"{WRITING}, line 1 has no text 'query'"),
    ],
    "table": [
        (swap("own.csv", ",1,", ",maybe,"), "own.csv, record 2 has the label 'maybe'; it must be 0 (harmless)"),
        (swap("own.csv", "How do I break a lamp?", ""), "own.csv, record 2 has an empty prompt and no image"),
    ],
}


@pytest.mark.parametrize(("name", "apply", "said"), [(name, *case) for name, cases in BROKEN.items() for case in cases])
def test_broken(whole: dict[str, Path], tmp_path: Path, name: str, apply: Break, said: str) -> None:
    found, root = complaint(whole, tmp_path, name, apply)
    assert said.replace("{root}", str(root)) in found


def in_format(name: str, kind: str) -> Break:
    """The picture in another format, under its old name."""

    def apply(root: Path) -> None:
        miniature.picture(root / f"other.{kind}", 0).rename(root / name)

    return apply


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("way", ["gone", "text", "cut off", "EPS", "ICO"])
def test_a_picture_that_cannot_be_read(whole: dict[str, Path], tmp_path: Path, name: str, way: str) -> None:
    """Pillow reads many formats, and starts a program for some: those that are allowed are named."""
    file = PICTURES[name]
    ways = {"gone": remove(file), "text": put(file, b"text"), "cut off": cut(file)}
    found, root = complaint(whole, tmp_path, name, ways.get(way) or in_format(file, way.lower()))
    why = "does not exist" if way == "gone" else "cannot be read"
    assert f"names the image {root / file}, which {why}" in found and ("line 3" in found or "record " in found)
    assert way == "gone" or "Give it as PNG, JPEG, WEBP" in found
