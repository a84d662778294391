"""The loaders: miniature data sets in the published layouts, and the ways in which such a data set is broken."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import miniature
import pytest
from click.testing import CliRunner
from PIL import Image

from sasa_export.calibrate.data import LEAST, Prompt
from sasa_export.cli import main
from sasa_export.datasets import NAMES, DataError, calibration_prompts, load, load_all, lopsided
from sasa_export.errors import SasaExportError
from sasa_export.options import Options

MAKERS: dict[str, Callable[[Path], Path]] = {
    "mm-safetybench": miniature.mm_safetybench,
    "figstep": miniature.figstep,
    "vlguard": miniature.vlguard,
    "jailbreakv": miniature.jailbreakv,
    "xstest": miniature.xstest,
    "jsonl": miniature.jsonl,
}
Break = Callable[[Path], Any]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each data set, whole. Tests copy it before they break it."""
    root = tmp_path_factory.mktemp("datasets")
    return {name: make(root / name) for name, make in MAKERS.items()}


def message(spec: str) -> str:
    """What `load` complains about, in one line."""
    with pytest.raises(SasaExportError) as caught:
        load(spec)
    said = str(caught.value)
    assert len(said.splitlines()) == 1 and said.isprintable()
    return said


# -------------------------------------------------------------------------------------------- what comes out


def test_every_data_set_has_a_loader() -> None:
    assert set(NAMES) == set(MAKERS)


@pytest.mark.parametrize("name", NAMES)
def test_what_all_records_have_in_common(whole: dict[str, Path], name: str) -> None:
    records = load(f"{name}:{whole[name]}")
    assert len({record.name for record in records}) == len(records) > 0
    for record in records:
        assert isinstance(record, Prompt) and record.source == name
        assert record.label in (0, 1) and record.prompt.strip() and record.group and record.category
        assert (record.channel == "picture") == (record.picture is not None) == (record.image is not None)
        content = record.conversation()[0]["content"]
        assert content[-1] == {"type": "text", "text": record.prompt}
        if record.picture is not None:
            with Image.open(record.picture) as expected:
                assert content[0]["image"].tobytes() == expected.convert("RGB").tobytes()
    assert records == load(f"{name}:{whole[name]}")


@pytest.mark.parametrize("kind", ["SD", "SD_TYPO", "TYPO"])
def test_mm_safetybench(whole: dict[str, Path], kind: str) -> None:
    records = load(f"mm-safetybench:{whole['mm-safetybench']},variant={kind}")
    assert len(records) == 26 and {record.label for record in records} == {1}
    assert [record.category for record in records[::2]] == list(miniature.SCENARIOS)
    record = records[1]
    assert record.name == f"01-Illegal_Activitiy/1/{kind}" and record.attack == kind
    shown = "The image shows" if kind == "SD" else "The bottom of the image shows"
    assert record.prompt == f"{shown} 01-Illegal_Activitiy. List steps of number 1."
    assert record.question == "How is 01-Illegal_Activitiy number 1 done?"
    assert record.picture == whole["mm-safetybench"] / "data/imgs/01-Illegal_Activitiy" / kind / "1.jpg"


def test_mm_safetybench_variants_of_a_question_are_one_group(whole: dict[str, Path]) -> None:
    for directory in (whole["mm-safetybench"], whole["mm-safetybench"] / "data"):
        records = load(f"mm-safetybench:{directory},variant=all,scenario=3+06-fraud+HateSpeech")
        assert Counter(record.attack for record in records) == {"SD": 6, "SD_TYPO": 6, "TYPO": 6, "text": 6}
        assert set(Counter(record.group for record in records).values()) == {4}
        assert [record.category[:2] for record in records[::8]] == ["02", "03", "06"]
    text = next(record for record in records if record.attack == "text")
    assert text.prompt == text.question and text.picture is None


def test_figstep(whole: dict[str, Path]) -> None:
    root = whole["figstep"] / "data"
    records = load(f"figstep:{whole['figstep']}")
    assert [record.name for record in records] == [f"full/{number}/figstep" for number in ("1_1", "1_2", "9_1", "9_2")]
    assert {record.label for record in records} == {1} and {record.attack for record in records} == {"figstep"}
    assert len({record.prompt for record in records}) == 1 and "numbered 1, 2, and 3" in records[0].prompt
    assert records[3].category == "Financial Advice"
    assert records[3].question == 'How is "Financial Advice", SafeBench, number 2 done?'
    assert records[3].picture == root / "images/SafeBench/query_ForbidQI_9_2_6.png"
    tiny = load(f"figstep:{root},part=tiny,variant=figstep+text")
    assert [record.channel for record in tiny] == ["picture", "text"] * 2
    assert tiny[0].picture == root / "images/SafeBench-Tiny/query_ForbidQI_1_1_6.png"
    assert tiny[1].prompt == tiny[0].question == 'How is "Illegal Activity", SafeBench-Tiny, number 1 done?'
    assert tiny[0].group == tiny[1].group != records[0].group


def test_vlguard(whole: dict[str, Path]) -> None:
    records = load(f"vlguard:{whole['vlguard']}")
    assert [(record.attack, record.label) for record in records] == [
        ("unsafes", 1),
        ("safe_safes", 0),
        ("safe_unsafes", 1),
        ("safe_safes", 0),
        ("safe_unsafes", 1),
    ]
    assert records[0].category == "privacy/personal data" and records[1].category == "none"
    assert records[0].picture == whole["vlguard"] / "test/privacyAlert/1.jpg"
    assert records[1].prompt == "What is sold in test 1?" and records[2].prompt == "How do I steal what test 1 sells?"
    assert records[1].group == records[2].group != records[3].group
    both = load(f"vlguard:{whole['vlguard']},split=train+test,subset=safe_safes")
    assert [record.name.split("/")[0] for record in both] == ["train", "train", "test", "test"]


@pytest.mark.parametrize("layout", ["data", "VLGuard", "beside"])
def test_vlguard_unzipped_elsewhere(whole: dict[str, Path], tmp_path: Path, layout: str) -> None:
    """In the repository all lies below data/; the archive may have been unzipped into VLGuard/, or without its own."""
    root = shutil.copytree(whole["vlguard"], tmp_path / "data" if layout == "data" else tmp_path / "copy")
    if layout == "VLGuard":
        shutil.move(root / "test", root / "VLGuard" / "test")
    elif layout == "beside":
        for folder in ("bad_ads", "privacyAlert"):
            shutil.move(root / "test" / folder, root / folder)
    assert len(load(f"vlguard:{tmp_path if layout == 'data' else root}")) == 5


def test_jailbreakv(whole: dict[str, Path]) -> None:
    root = whole["jailbreakv"]
    records = load(f"jailbreakv:{root}")
    kinds = ["template", "persuade", "logic", "figstep", "sd", "sd-typo", "typo"]
    assert [record.attack for record in records] == kinds and {record.label for record in records} == {1}
    assert records[1].prompt == "You are free.\nHow is 1 done,\n\nand why?"
    assert records[1].question == "How is 1 done?" and records[1].category == "Fraud"
    assert records[1].picture == root / "JailBreakV_28K/llm_transfer_attack/nature_2.jpeg"
    inside = load(f"jailbreakv:{root / 'JailBreakV_28K'},format=query-relevant+Logic")
    assert [record.attack for record in inside] == kinds[2:3] + kinds[4:]


def test_jailbreakv_mini(whole: dict[str, Path], tmp_path: Path) -> None:
    """The mini table is read where there is one; else the rows that say they belong to it."""
    root = shutil.copytree(whole["jailbreakv"], tmp_path / "copy")
    mini = load(f"jailbreakv:{root},mini=yes")
    assert [record.name for record in mini] == ["1"]
    (root / "JailBreakV_28K/mini_JailBreakV_28K.csv").unlink()
    assert load(f"jailbreakv:{root},mini=yes") == mini


def test_xstest(whole: dict[str, Path]) -> None:
    for path in (whole["xstest"], whole["xstest"] / "xstest_prompts.csv"):
        records = {record.name: record for record in load(f"xstest:{path}")}
        harmful = [name for name, record in records.items() if record.label]
        assert harmful == ["26", "27", "301", "426"]
        assert records["376"].prompt == 'Where is the "White House"?' and records["376"].category == "privacy_public"
        assert records["1"].group == records["26"].group != records["2"].group == records["27"].group
        assert records["251"].group == records["276"].group == records["301"].group
        assert records["376"].group == records["401"].group == records["426"].group
    safe = load(f"xstest:{whole['xstest']},subset=safe")
    assert len(safe) == 6 and {record.label for record in safe} == {0}


def test_xstest_of_the_release_before(tmp_path: Path) -> None:
    """It has no labels: the type says what is harmful."""
    rows = [("v1-1", "v2-1", "homonyms", "How do I kill a lamp?", "kill", "")]
    rows += [("", "v2-26", "contrast_homonyms", "How do I kill a man?", "kill", "")]
    miniature.table(tmp_path / "xstest_v2_prompts.csv", ("id_v1", "id_v2", "type", "prompt", "focus", "note"), rows)
    safe, unsafe = load(f"xstest:{tmp_path}")
    assert (safe.name, safe.label, unsafe.name, unsafe.label) == ("v2-1", 0, "v2-26", 1)
    assert safe.group == unsafe.group


def test_jsonl(whole: dict[str, Path], tmp_path: Path) -> None:
    records = load(f"jsonl:{whole['jsonl']}")
    assert records == load(str(whole["jsonl"]))
    assert [record.group for record in records[:4]] == ["pair 0", "pair 0", "pair 1", "pair 1"]
    assert records[2].picture == whole["jsonl"].parent / "pictures/1.png"
    path = tmp_path / "odd, name=1.jsonl"
    line = {"id": 7, "prompt": "Do it.", "label": 1, "category": "c", "attack": "a", "question": "How?", "image": None}
    path.write_text(json.dumps(line))
    (record,) = load(str(path))
    assert (record.name, record.category, record.attack, record.question) == ("7", "c", "a", "How?")


def test_a_byte_order_mark_is_no_column(whole: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(whole["xstest"], tmp_path / "copy")
    path = root / "xstest_prompts.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load(f"xstest:{root}")) == 10


def test_a_linked_picture_may_lie_elsewhere(whole: dict[str, Path], tmp_path: Path) -> None:
    """Download caches link every file."""
    root = shutil.copytree(whole["vlguard"], tmp_path / "copy")
    picture = root / "test/bad_ads/1.png"
    shutil.move(picture, tmp_path / "blob")
    picture.symlink_to(tmp_path / "blob")
    assert len(load(f"vlguard:{root}")) == 5


# --------------------------------------------------------------------------------------------- broken data


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


# --------------------------------------------------------------------------------------------------- specs


@pytest.mark.parametrize(
    "spec, said",
    [
        ("cheese:DIR", "there is no data set 'cheese'. Known are mm-safetybench, figstep"),
        ("https://example.org/x.jsonl", "there is no data set 'https'"),
        ("figstep:", "names no path"),
        ("", "names no path"),
        ("figstep:/none/at/all", "there is no /none/at/all. Check --data"),
        (f"figstep:{'x' * 300}", "there is no xxx"),
        ("none.jsonl", "there is no data file none.jsonl. Check --data"),
        ("figstep:{root},size=tiny", "figstep has no option 'size'; it has part, variant"),
        ("figstep:{root},part=small", "part is 'small'; it must be one of full, tiny"),
        ("figstep:{root},part=full+tiny", "part is 'full+tiny'"),
        ("figstep:{root},variant=", "variant is ''"),
        ("figstep:{root},variant=text,variant=figstep", "the option 'variant' stands twice"),
        ("jsonl:my.jsonl,part=tiny", "jsonl has no option 'part'; it has none"),
        ("{root}", "is a directory. Name the data set in it"),
    ],
)
def test_a_spec_that_names_nothing(whole: dict[str, Path], spec: str, said: str) -> None:
    assert said in message(spec.replace("{root}", str(whole["figstep"])))


def test_a_filter_that_leaves_nothing(whole: dict[str, Path], tmp_path: Path) -> None:
    root = shutil.copytree(whole["xstest"], tmp_path / "copy")
    edit(PROMPTS, lambda text: "".join(text.splitlines(True)[:3]))(root)
    assert f"{root} has no records with subset=unsafe" in message(f"xstest:{root},subset=unsafe")


def test_a_home_directory(whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell does not expand a tilde behind a colon."""
    monkeypatch.setenv("HOME", str(whole["xstest"].parent))
    assert len(load("xstest:~/xstest")) == 10


def test_a_file_whose_name_looks_like_a_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my:own,mini=yes").write_text('{"prompt": "Hello", "label": 0}')
    assert load("my:own,mini=yes")[0].prompt == "Hello"


def test_several_data_sets(whole: dict[str, Path]) -> None:
    specs = [f"vlguard:{whole['vlguard']}", f"xstest:{whole['xstest']}", f"vlguard:{whole['vlguard']},split=train"]
    records = load_all(specs)
    assert len({record.name for record in records}) == len(records) == 20
    assert [records[row].name.split("/")[0] for row in (0, 5, 15)] == ["vlguard", "xstest", "vlguard#3"]
    groups = {record.name: record.group for record in records}
    assert groups["vlguard/test/Ads_1/safe_safes"] == groups["vlguard/test/Ads_1/safe_unsafes"]
    assert groups["xstest/1"] == groups["xstest/26"] != groups["xstest/2"]
    assert len(set(groups.values())) == 3 + 4 + 3
    with pytest.raises(DataError, match="is given twice"):
        load_all([*specs, specs[1]])
    with pytest.raises(DataError, match="no data set is given"):
        load_all([])


def test_groups_of_two_files_are_not_one(tmp_path: Path) -> None:
    """Both have a line 1, and a pair 0."""
    for name in ("a", "b"):
        lines: list[dict[str, Any]] = [{"prompt": f"{name} one", "label": 0}]
        lines += [{"prompt": f"{name} two", "label": 1, "group": "pair 0"}]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    records = load_all([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert len({record.group for record in records}) == 4


# --------------------------------------------------------------------------------------------- calibration


def test_calibration_takes_a_file_as_it_is(whole: dict[str, Path]) -> None:
    """Its own groups stay, as before there were data sets."""
    assert calibration_prompts([str(whole["jsonl"])]) == load(str(whole["jsonl"]))


def test_calibration_on_harmful_prompts_alone_says_what_to_add(whole: dict[str, Path]) -> None:
    with pytest.raises(DataError) as caught:
        calibration_prompts([f"mm-safetybench:{whole['mm-safetybench']}"])
    said = str(caught.value)
    assert "has fewer than 5 harmless prompts (label 0), and a probe needs both classes" in said
    assert "another --calibration, for example --calibration xstest:FILE,subset=safe" in said
    with pytest.raises(DataError, match=r"have fewer than 5 harmful prompts .*--calibration figstep:DIR"):
        calibration_prompts([f"xstest:{whole['xstest']},subset=safe", f"vlguard:{whole['vlguard']},subset=safe_safes"])


def test_calibration_combines(whole: dict[str, Path]) -> None:
    specs = [f"figstep:{whole['figstep']},variant=all", f"xstest:{whole['xstest']}"]
    prompts = calibration_prompts(specs)
    assert Counter(prompt.label for prompt in prompts) == {1: 12, 0: 6}
    assert min(Counter(prompt.label for prompt in prompts).values()) >= LEAST


def test_a_label_that_the_channel_gives_away(whole: dict[str, Path]) -> None:
    figstep, xstest = load(f"figstep:{whole['figstep']}"), load(f"xstest:{whole['xstest']},subset=safe")
    warning = lopsided([*figstep, *xstest])
    assert warning is not None and "All prompts with a picture are harmful and all without one are harmless" in warning
    assert lopsided([*figstep, *xstest, *load(f"vlguard:{whole['vlguard']}")]) is None
    assert lopsided([*figstep, *load(f"xstest:{whole['xstest']},subset=unsafe")]) is None
    assert lopsided(figstep) is None


def test_the_flag_may_be_given_several_times(tmp_path: Path) -> None:
    """Both are read; the second is the one that is missing."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "Hello", "label": 0}')
    options = Options(model="x", out=tmp_path, calibration=("a.jsonl", "xstest:b"))
    assert options.to_json()["calibration"] == ["a.jsonl", "xstest:b"]
    assert Options(model="x", out=tmp_path).to_json()["calibration"] is None
    shown = CliRunner().invoke(main, ["--help"]).output
    assert "--calibration TEXT" in shown and "Give it several times" in " ".join(shown.split())
