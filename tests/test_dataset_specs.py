"""How data sets are named, filtered and combined, for calibration too."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from dataset_fixtures import message

from sasa_export.cli import main
from sasa_export.options import Options
from sasa_export.prompts import DataError, calibration_prompts, load, load_all, lopsided
from sasa_export.prompts.prompt import LEAST

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
    prompts = root / "xstest_prompts.csv"
    prompts.write_text("".join(prompts.read_text(encoding="utf-8").splitlines(True)[:3]), encoding="utf-8")
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
