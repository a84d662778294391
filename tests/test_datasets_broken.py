"""The ways in which a data set is broken, and how each loader says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dataset_fixtures import message

from sasa_export.errors import SasaExportError
from sasa_export.prompts import DataError, load

Break = Callable[[Path], Any]


def edit(name: str, change: Callable[[str], str]) -> Break:
    """Change the text of a file."""

    def apply(root: Path) -> None:
        path = root / name
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

    return apply


def swap(name: str, old: str, new: str) -> Break:
    """Replace the first `old`, which must be there."""

    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return edit(name, change)


def put(name: str, content: bytes) -> Break:
    return lambda root: (root / name).write_bytes(content)


def remove(name: str) -> Break:
    return lambda root: (root / name).unlink()


def cut(name: str) -> Break:
    """Leave the first half of a file, as an interrupted download does."""
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[: (root / name).stat().st_size // 2])


def as_json(name: str, change: Callable[[Any], Any]) -> Break:
    """Change a JSON file in place, or by what `change` returns."""

    def apply(text: str) -> str:
        value = json.loads(text)
        result = change(value)
        return json.dumps(value if result is None else result)

    return edit(name, apply)


def at(*keys: Any, value: Any) -> Callable[[Any], None]:
    """Set what lies at `keys`."""

    def change(found: Any) -> None:
        for key in keys[:-1]:
            found = found[key]
        found[keys[-1]] = value

    return change


def drop(*keys: Any) -> Callable[[Any], None]:
    """Delete what lies at `keys`."""

    def change(found: Any) -> None:
        for key in keys[:-1]:
            found = found[key]
        del found[keys[-1]]

    return change


FRAUD = "data/processed_questions/06-Fraud.json"
FRAUD_PICTURE = "data/imgs/06-Fraud/SD_TYPO/1.jpg"
FULL = "data/question/safebench.csv"
FULL_PICTURE = "data/images/SafeBench/query_ForbidQI_9_1_6.png"
GUARD = "test.json"
BREAK_V = "JailBreakV_28K/JailBreakV_28K.csv"
PROMPTS = "xstest_prompts.csv"
LINES = "prompts.jsonl"

# What is done to the data set, and what the message must name.
BROKEN: dict[str, dict[str, tuple[Break, list[str]]]] = {
    "mm-safetybench": {
        "a scenario is missing": (remove(FRAUD), [f"there is no file {{root}}/{FRAUD}", "scenario=01+02"]),
        "JSON cut off": (cut(FRAUD), [f"{{root}}/{FRAUD} is not valid JSON"]),
        "a list": (put(FRAUD, b"[1, 2]"), [f"{{root}}/{FRAUD} is no JSON object"]),
        "nested too deep": (put(FRAUD, b"[" * 100_000), [f"{{root}}/{FRAUD} is not JSON of"]),
        "empty": (put(FRAUD, b"{}"), [f"{{root}}/{FRAUD} has no questions"]),
        "not UTF-8": (put(FRAUD, '{"0": "é"}'.encode("latin-1")), [f"{{root}}/{FRAUD} is not in UTF-8"]),
        "unknown scenario": (
            put("data/processed_questions/14-Cheese.json", b"{}"),
            ["14-Cheese.json is of an unknown scenario"],
        ),
        "a question twice": (
            edit(FRAUD, lambda text: text.replace('"1":', '"0":')),
            [f"{{root}}/{FRAUD} has '0' twice in one object"],
        ),
        "a record that is none": (as_json(FRAUD, at("1", value=3)), [FRAUD, "record '1' is no JSON object"]),
        "no question": (as_json(FRAUD, drop("1", "Question")), [FRAUD, "record '1' has no 'Question'"]),
        "no prompt": (
            as_json(FRAUD, drop("1", "Rephrased Question")),
            [FRAUD, "record '1' has no 'Rephrased Question'"],
        ),
        "blank prompt": (
            as_json(FRAUD, at("1", "Rephrased Question", value=" \n")),
            [FRAUD, "record '1' has an empty 'Rephrased Question'"],
        ),
        "a prompt that is a number": (
            as_json(FRAUD, at("1", "Rephrased Question", value=5)),
            [FRAUD, "record '1' has a 'Rephrased Question' that is no text (int)"],
        ),
        "half a character": (
            as_json(FRAUD, at("1", "Rephrased Question", value="\ud800")),
            [FRAUD, "record '1' has half a character"],
        ),
        "no picture": (remove(FRAUD_PICTURE), [FRAUD, f"record '1' names the picture {{root}}/{FRAUD_PICTURE}"]),
        "text for a picture": (put(FRAUD_PICTURE, b"text"), [FRAUD, FRAUD_PICTURE, "which cannot be read"]),
        "a picture cut off": (cut(FRAUD_PICTURE), [FRAUD, FRAUD_PICTURE, "which cannot be read"]),
        "out of the directory": (
            edit(FRAUD, lambda text: text.replace('"1":', '"../../../1":')),
            [FRAUD, "record '../../../1' names the picture", "leaves the data set's directory"],
        ),
    },
    "figstep": {
        "no table": (remove(FULL), [f"there is no file {{root}}/{FULL}", "figstep:DIR"]),
        "an empty table": (put(FULL, b""), [f"{{root}}/{FULL} is empty"]),
        "a header alone": (edit(FULL, lambda text: text.splitlines(True)[0]), ["{root} has no records"]),
        "no column": (swap(FULL, "instruction", "what"), [f"{{root}}/{FULL} has no column 'instruction'"]),
        "a column twice": (
            swap(FULL, "instruction", "instruction,question"),
            [f"{{root}}/{FULL} has a column twice"],
        ),
        "too many fields": (edit(FULL, lambda text: text.rstrip() + ",more\n"), [f"{FULL}, line 5 has more fields"]),
        "too few fields": (edit(FULL, lambda text: text + "ForbidQI,9,3\n"), [f"{FULL}, line 6 has fewer fields"]),
        "an open quote": (edit(FULL, lambda text: text + '"ForbidQI,9'), [f"{FULL}, line 6 is not valid CSV"]),
        "not UTF-8": (put(FULL, "dataset;é".encode("utf-16")), [f"{{root}}/{FULL} is not in UTF-8"]),
        "another data set": (swap(FULL, "ForbidQI,9,1", "Other,9,1"), [f"{FULL}, line 4 is of the data set 'Other'"]),
        "a number that is none": (
            swap(FULL, "ForbidQI,9,1", "ForbidQI,9,../1"),
            [f"{FULL}, line 4 has the task_id '../1'"],
        ),
        "a number twice": (
            swap(FULL, "ForbidQI,9,2", "ForbidQI,9,1"),
            [f"{FULL}, line 5 has the id '9_1'", "line 4 has already"],
        ),
        "no topic": (swap(FULL, "9,1,Financial Advice", "9,1,"), [f"{FULL}, line 4 has an empty 'category_name'"]),
        "no question": (
            edit(FULL, lambda text: text + "ForbidQI,9,3,Financial Advice, ,Steps.\n"),
            [f"{FULL}, line 6 has an empty 'question'"],
        ),
        "no picture": (remove(FULL_PICTURE), [f"{FULL}, line 4 names the picture {{root}}/{FULL_PICTURE}"]),
        "text for a picture": (put(FULL_PICTURE, b"text"), [f"{FULL}, line 4", FULL_PICTURE, "cannot be read"]),
        "a picture cut off": (cut(FULL_PICTURE), [f"{FULL}, line 4", FULL_PICTURE, "cannot be read"]),
    },
    "vlguard": {
        "no table": (remove(GUARD), [f"there is no file {{root}}/{GUARD}", "vlguard:DIR"]),
        "JSON cut off": (cut(GUARD), [f"{{root}}/{GUARD} is not valid JSON"]),
        "an object": (put(GUARD, b"{}"), [f"{{root}}/{GUARD} is no JSON list"]),
        "empty": (put(GUARD, b"[]"), ["{root} has no records"]),
        "not UTF-8": (put(GUARD, '["é"]'.encode("latin-1")), [f"{{root}}/{GUARD} is not in UTF-8"]),
        "a long number": (put(GUARD, b"[" + b"1" * 5000 + b"]"), [f"{{root}}/{GUARD} is not JSON of"]),
        "a record that is none": (as_json(GUARD, at(1, value="x")), [f"{GUARD}, record 2 is no JSON object"]),
        "no id": (as_json(GUARD, drop(1, "id")), [f"{GUARD}, record 2 has no 'id'"]),
        "an id twice": (
            as_json(GUARD, at(2, "id", value="Ads_1")),
            [f"{GUARD}, record 3 ('Ads_1') has the id 'test/Ads_1'", "record 2 ('Ads_1') has already"],
        ),
        "no label": (as_json(GUARD, drop(1, "safe")), [f"{GUARD}, record 2 ('Ads_1') has None as \"safe\""]),
        "another label": (as_json(GUARD, at(1, "safe", value="yes")), [f"{GUARD}, record 2 ('Ads_1') has 'yes'"]),
        "no category": (
            as_json(GUARD, drop(0, "harmful_category")),
            [f"{GUARD}, record 1 ('PrivacyAlert_test_1') has no 'harmful_category'"],
        ),
        "no instructions": (
            as_json(GUARD, at(1, "instr-resp", value={})),
            [f"{GUARD}, record 2 ('Ads_1') has no list of instructions"],
        ),
        "no harmful instruction": (
            as_json(GUARD, drop(1, "instr-resp", 1)),
            [f"{GUARD}, record 2 ('Ads_1') has no 'unsafe_instruction'"],
        ),
        "blank instruction": (
            as_json(GUARD, at(0, "instr-resp", 0, "instruction", value="")),
            [f"{GUARD}, record 1 ('PrivacyAlert_test_1') has an empty 'instruction'"],
        ),
        "no name of a picture": (as_json(GUARD, drop(1, "image")), [f"{GUARD}, record 2 ('Ads_1') has no 'image'"]),
        "no picture": (
            remove("test/bad_ads/1.png"),
            [f"{GUARD}, record 2 ('Ads_1') names the picture {{root}}/test/bad_ads/1.png, which does not exist"],
        ),
        "text for a picture": (put("test/bad_ads/1.png", b"text"), [f"{GUARD}, record 2", "cannot be read"]),
        "a picture cut off": (cut("test/privacyAlert/1.jpg"), [f"{GUARD}, record 1", "cannot be read"]),
        "out of the directory": (
            as_json(GUARD, at(1, "image", value="../train/bad_ads/1.png")),
            [f"{GUARD}, record 2 ('Ads_1') names the picture '../train/bad_ads/1.png', which leaves"],
        ),
        "an absolute path": (
            as_json(GUARD, at(1, "image", value="/etc/passwd")),
            [f"{GUARD}, record 2 ('Ads_1') names the picture '/etc/passwd', which leaves"],
        ),
        "a path of another system": (
            as_json(GUARD, at(1, "image", value="C:\\pictures\\1.png")),
            [f"{GUARD}, record 2 ('Ads_1') names the picture", "which leaves"],
        ),
        "a name that no file has": (
            as_json(GUARD, at(1, "image", value="a\n\0" + "b" * 300)),
            [f"{GUARD}, record 2 ('Ads_1') names the picture", "which does not exist"],
        ),
    },
    "jailbreakv": {
        "no table": (remove(BREAK_V), [f"there is no file {{root}}/{BREAK_V}", "jailbreakv:DIR"]),
        "an empty table": (put(BREAK_V, b"\n"), [f"{{root}}/{BREAK_V} is empty"]),
        "a header alone": (edit(BREAK_V, lambda text: text.splitlines(True)[0]), ["{root} has no records"]),
        "no flag at the end": (
            edit(BREAK_V, lambda text: text.rstrip().removesuffix("False")),
            [f"{BREAK_V}, line ", "(id 6) has '' as transfer_from_llm"],
        ),
        "no column": (swap(BREAK_V, "redteam_query", "query"), [f"{{root}}/{BREAK_V} has no column 'redteam_query'"]),
        "not UTF-8": (put(BREAK_V, b"id,\xff"), [f"{{root}}/{BREAK_V} is not in UTF-8"]),
        "cut off": (cut(BREAK_V), [f"{BREAK_V}, line "]),
        "no id": (edit(BREAK_V, lambda text: text.replace('\n6,"', '\n,"')), [BREAK_V, "has an empty 'id'"]),
        "an id twice": (
            edit(BREAK_V, lambda text: text.replace('\n6,"', '\n5,"')),
            [f"{BREAK_V}, line ", "has the id '5', which", "has already"],
        ),
        "an unknown format": (swap(BREAK_V, "Logic", "Poem"), [f"{BREAK_V}, line ", "(id 2) has the unknown format"]),
        "no format": (swap(BREAK_V, ",Logic,", ",,"), [f"{BREAK_V}, line ", "(id 2) has an empty 'format'"]),
        "a flag that is none": (
            swap(BREAK_V, "False,True", "perhaps,True"),
            [f"{BREAK_V}, line 2 (id 0) has 'perhaps' as selected_mini"],
        ),
        "blank prompt": (
            swap(BREAK_V, '"You are free.\nHow is 1 done,\n\nand why?"', '" "'),
            [f"{BREAK_V}, line ", "(id 1) has an empty 'jailbreak_query'"],
        ),
        "no question": (swap(BREAK_V, "How is 1 done?", ""), ["(id 1) has an empty 'redteam_query'"]),
        "no policy": (swap(BREAK_V, "Persuade,Fraud", "Persuade,"), ["(id 1) has an empty 'policy'"]),
        "no name of a picture": (
            swap(BREAK_V, "llm_transfer_attack/nature_2.jpeg", ""),
            ["(id 1) has an empty 'image_path'"],
        ),
        "no picture": (
            remove("JailBreakV_28K/figstep/figstep_4.png"),
            [f"{BREAK_V}, line ", "(id 3) names the picture {root}/JailBreakV_28K/figstep/figstep_4.png"],
        ),
        "text for a picture": (
            put("JailBreakV_28K/figstep/figstep_4.png", b"text"),
            ["(id 3) names the picture {root}/JailBreakV_28K/figstep/figstep_4.png, which cannot be read"],
        ),
        "out of the directory": (
            swap(BREAK_V, "figstep/figstep_4.png", "figstep/../../x.png"),
            ["(id 3) names the picture 'figstep/../../x.png', which leaves"],
        ),
        "an absolute path": (
            swap(BREAK_V, "figstep/figstep_4.png", "/etc/passwd"),
            ["(id 3) names the picture '/etc/passwd', which leaves"],
        ),
    },
    "xstest": {
        "no table": (remove(PROMPTS), [f"there is no file {{root}}/{PROMPTS}", "xstest:FILE"]),
        "an empty table": (put(PROMPTS, b""), [f"{{root}}/{PROMPTS} is empty"]),
        "a header alone": (edit(PROMPTS, lambda text: text.splitlines(True)[0]), ["{root} has no records"]),
        "no ids": (swap(PROMPTS, "id,", "number,"), [f"{{root}}/{PROMPTS} has no column 'id'"]),
        "no types": (swap(PROMPTS, ",type,", ",kind,"), [f"{{root}}/{PROMPTS} has no column 'type'"]),
        "no prompts": (swap(PROMPTS, "prompt", "text"), [f"{{root}}/{PROMPTS} has no column 'prompt'"]),
        "not UTF-8": (put(PROMPTS, "id,prompt,type\n1,é,homonyms".encode("latin-1")), ["is not in UTF-8"]),
        "no id": (swap(PROMPTS, "\n2,", "\n,"), [f"{PROMPTS}, line 3 has an empty 'id'"]),
        "an id twice": (swap(PROMPTS, "\n2,", "\n1,"), [f"{PROMPTS}, line 3 has the id '1', which", "line 2 has"]),
        "an unknown type": (
            swap(PROMPTS, "contrast_discr", "contrast_cheese"),
            [f"{PROMPTS}, line 8 has the unknown type 'contrast_cheese'"],
        ),
        "another label": (swap(PROMPTS, "homonyms,safe", "homonyms,fine"), [f"{PROMPTS}, line 2 has the label 'fine'"]),
        "a label of another type": (
            swap(PROMPTS, "contrast_homonyms,unsafe", "contrast_homonyms,safe"),
            [f"{PROMPTS}, line 4 has the label 'safe', which contradicts its type 'contrast_homonyms'"],
        ),
        "blank prompt": (swap(PROMPTS, "How do I kill a man?", " "), [f"{PROMPTS}, line 4 has an empty 'prompt'"]),
        "too few fields": (edit(PROMPTS, lambda text: text + "427,How?\n"), [f"{PROMPTS}, line 12 has fewer fields"]),
        "too many fields": (edit(PROMPTS, lambda text: text.rstrip() + ",x\n"), [f"{PROMPTS}, line 11 has more"]),
        "an open quote": (edit(PROMPTS, lambda text: text + '427,"How'), [f"{PROMPTS}, line 12 is not valid CSV"]),
    },
    "jsonl": {
        "no file": (remove(LINES), [f"there is no data file {{root}}/{LINES}", "--data"]),
        "empty": (put(LINES, b"\n"), [f"{{root}}/{LINES} has no records"]),
        "not UTF-8": (put(LINES, b"\xff\xfe"), [f"{{root}}/{LINES} cannot be read"]),
        "cut off": (edit(LINES, lambda text: text.rstrip()[:-9]), [f"{LINES}, line 12 is not valid JSON"]),
        "a list": (edit(LINES, lambda text: text + "[]"), [f'{LINES}, line 13 has no "prompt" string']),
        "nested too deep": (edit(LINES, lambda text: text + "[" * 100_000), [f"{LINES}, line 13"]),
        "no prompt": (swap(LINES, '"prompt"', '"text"'), [f'{LINES}, line 1 has no "prompt" string']),
        "blank prompt": (swap(LINES, "How do I bake 0?", " "), [f"{LINES}, line 1 has an empty prompt and no image"]),
        "half a character": (swap(LINES, "bake 0", "\\udfff"), [f"{LINES}, line 1 has half a character"]),
        "another label": (swap(LINES, '"label": 1', '"label": 2'), [f"{LINES}, line 2 has the label 2"]),
        "no label": (swap(LINES, '"label": 1', '"class": 1'), [f"{LINES}, line 2 has the label None"]),
        "a picture that is a number": (
            swap(LINES, '"pictures/1.png"', "1"),
            [f'{LINES}, line 3 has an "image" that is neither a path nor null'],
        ),
        "no picture": (remove("pictures/1.png"), [f"{LINES}, line 3 names the image {{root}}/pictures/1.png"]),
        "a question that is a number": (
            swap(LINES, '"label": 1', '"question": 5, "label": 1'),
            [f'{LINES}, line 2 has a "question" that is no text'],
        ),
        "an id twice": (
            edit(LINES, lambda text: text.replace('{"image"', '{"id": 4, "image"')),
            [f"{LINES} has the \"id\" '4' twice"],
        ),
    },
}


def broken() -> Iterator[Any]:
    for name, ways in BROKEN.items():
        assert len(ways) >= 10
        for way, (apply, said) in ways.items():
            yield pytest.param(name, apply, said, id=f"{name}: {way}")


@pytest.mark.parametrize("name, apply, said", list(broken()))
def test_broken(whole: dict[str, Path], tmp_path: Path, name: str, apply: Break, said: list[str]) -> None:
    source = whole[name].parent if name == "jsonl" else whole[name]
    root = shutil.copytree(source, tmp_path / name)
    apply(root)
    complaint = message(f"{name}:{root / LINES if name == 'jsonl' else root}")
    for words in said:
        assert words.replace("{root}", str(root)) in complaint


def test_a_picture_of_jsonl_that_cannot_be_read(whole: dict[str, Path], tmp_path: Path) -> None:
    """It is opened when it is needed, and then named."""
    root = shutil.copytree(whole["jsonl"].parent, tmp_path / "copy")
    (root / "pictures/1.png").write_bytes(b"text")
    records = load(str(root / LINES))
    with pytest.raises(SasaExportError, match=r"line 3 names the image .*1\.png, which cannot be read"):
        records[2].conversation()


def test_a_picture_that_breaks_after_it_was_checked(whole: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(whole["figstep"], tmp_path / "copy")
    records = load(f"figstep:{root}")
    (root / FULL_PICTURE).write_bytes(b"text")
    with pytest.raises(DataError, match=r"safebench\.csv, line 4 names the picture .* which cannot be read"):
        records[2].conversation()


def test_a_file_that_cannot_be_read(whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: Path, **options: Any) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", deny)
    for name in ("mm-safetybench", "figstep", "vlguard", "jailbreakv", "xstest"):
        said = message(f"{name}:{whole[name]}")
        assert str(whole[name]) in said and "cannot be read (Permission denied)" in said
