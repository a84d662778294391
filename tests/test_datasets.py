"""The loaders: what comes out of miniature data sets in the published layouts."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import miniature
import pytest
from dataset_fixtures import MAKERS
from PIL import Image

from sasa_export.prompts import NAMES, load
from sasa_export.prompts.prompt import Prompt


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
