"""How data sets are named, filtered and combined, for calibration too."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from sasa_export.errors import DataError
from sasa_export.prompts import builtin, builtin_evaluation, calibration_prompts, load, load_all, lopsided


@pytest.mark.parametrize(
    "spec, said",
    [
        ("cheese:DIR", "there is no data set 'cheese'. Known are advbench, figstep"),
        ("https://example.org/x.jsonl", "there is no data set 'https'"),
        ("figstep:", "names no path"),
        ("", "names no path"),
        ("figstep:/none/at/all", "there is no data file or directory /none/at/all. Check --data"),
        (f"figstep:{'x' * 300}", "there is no data file or directory xxx"),
        ("none.jsonl", "there is no data file or directory none.jsonl. Check --data"),
        ("figstep:{root},size=tiny", "figstep has no option 'size'; it has part, variant"),
        ("figstep:{root},part=small", "part 'small' must be one of full, tiny"),
        ("figstep:{root},variant=", "variant '' must be one of figstep, text"),
        ("jsonl:my.jsonl,part=tiny", "jsonl has no option 'part'; it has none"),
        ("{root}", "is a directory. Name its data set, as name:"),
    ],
)
def test_a_spec_that_names_nothing(whole: dict[str, Path], spec: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        load(spec.replace("{root}", str(whole["figstep"])))
    assert said in str(caught.value)


def test_a_filter_that_leaves_nothing(whole: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(whole["xstest"] / "xstest_prompts.csv", tmp_path))
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(True)[:3]), encoding="utf-8")
    with pytest.raises(DataError, match="has no prompts, or none that the options leave"):
        load(f"xstest:{path},subset=unsafe")


def test_case_and_underscores_do_not_count(whole: dict[str, Path]) -> None:
    every = load(f"mm-safetybench:{whole['mm-safetybench']},variant=ALL,scenario=07")
    assert every == load(f"mm-safetybench:{whole['mm-safetybench']},scenario=07,variant=text+sd+sd-typo+Typo")


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
    prompts = load_all(specs)
    assert len({prompt.name for prompt in prompts}) == len(prompts) == 20
    assert [prompts[row].name.split("/")[0] for row in (0, 5, 15)] == ["vlguard#1", "xstest#2", "vlguard#3"]
    groups = {prompt.name: prompt.group for prompt in prompts}
    assert groups["vlguard#1/test/Ads_1/safe_safes"] == groups["vlguard#1/test/Ads_1/safe_unsafes"]
    assert groups["xstest#2/1"] == groups["xstest#2/26"] != groups["xstest#2/2"]
    assert len(set(groups.values())) == 3 + 4 + 3
    with pytest.raises(DataError, match="given twice"):
        load_all([*specs, specs[1]])


def test_groups_of_two_files_are_not_one(tmp_path: Path) -> None:
    """Both have a line 1, and a pair 0."""
    for name in ("a", "b"):
        lines = [{"prompt": f"{name} one", "label": 0}, {"prompt": f"{name} two", "label": 1, "group": "pair 0"}]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prompts = load_all([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert len({prompt.group for prompt in prompts}) == 4


def test_calibration_takes_a_file_as_it_is(whole: dict[str, Path]) -> None:
    """Its own groups stay; what comes from several is grouped anew."""
    alone = calibration_prompts([str(whole["jsonl"])])
    assert alone == load(str(whole["jsonl"])) and alone[0].group == "pair 0"
    combined = calibration_prompts([f"figstep:{whole['figstep']},variant=all", f"xstest:{whole['xstest']}"])
    assert Counter(prompt.label for prompt in combined) == {1: 12, 0: 6}


def test_prompts_of_ones_own_beside_the_built_in_set(tmp_path: Path) -> None:
    """One that asks what the built-in set asks too never stands on the other side of a split."""
    ours = calibration_prompts([])
    assert ours == builtin() == calibration_prompts(["builtin"]) and load("builtin") == builtin_evaluation()
    lines = [{"prompt": ours[0].prompt, "label": ours[0].label}, {"prompt": "something that nobody asks", "label": 0}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    joined = calibration_prompts(["builtin", str(tmp_path / "mine.jsonl")])
    assert len(joined) == len({prompt.name for prompt in joined}) == len(ours) + 2
    assert joined[-2].group == joined[0].group != joined[-1].group
    assert [prompt.kind for prompt in joined[-2:]] == ["jsonl/none"] * 2


def test_calibration_on_one_label_says_what_to_add(whole: dict[str, Path]) -> None:
    with pytest.raises(DataError) as caught:
        calibration_prompts([f"mm-safetybench:{whole['mm-safetybench']}"])
    said = str(caught.value)
    assert "a probe needs both kinds of prompts, and fewer than 5 are harmless (label 0)" in said
    assert "another --calibration, for example --calibration xstest:FILE,subset=safe" in said
    with pytest.raises(DataError, match=r"fewer than 5 are harmful .*--calibration figstep:DIR"):
        calibration_prompts([f"xstest:{whole['xstest']},subset=safe", f"vlguard:{whole['vlguard']},subset=safe_safes"])


def test_a_label_that_the_channel_gives_away(whole: dict[str, Path]) -> None:
    figstep, xstest = load(f"figstep:{whole['figstep']}"), load(f"xstest:{whole['xstest']},subset=safe")
    warning = lopsided([*figstep, *xstest])
    assert warning is not None and "All prompts with a picture are harmful and all without one are harmless" in warning
    assert lopsided([*figstep, *xstest, *load(f"vlguard:{whole['vlguard']}")]) is None
    assert lopsided([*figstep, *load(f"xstest:{whole['xstest']},subset=unsafe")]) is None
    assert lopsided(figstep) is None
