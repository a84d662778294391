"""Training and testing: parts of a data set never share a picture or a question, and a leak is found."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import miniature
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sasa_export.cli import main
from sasa_export.prompts import DataError, Record, asked, calibration_prompts, check_disjoint, grouped, load, split
from sasa_export.prompts.leak import normalised
from sasa_export.prompts.prompt import CARRIERS, builtin

Draw = tuple[int, int, int, int, int]  # question, picture, way of writing both, group, label

WAYS: tuple[Callable[[str], str], ...] = (
    str,
    str.upper,
    lambda text: f"  {text.replace(' ', chr(9))}?!",
    lambda text: f"«{text.title()}»",
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[list[Path]]:
    """Four pictures, each under as many names as there are ways."""
    folder = tmp_path_factory.mktemp("pictures")
    return [
        [miniature.picture(folder / f"{number}-{way}.png", number) for way in range(len(WAYS))] for number in range(4)
    ]


def text(name: str, words: str, *, label: int = 0, group: str = "", **more: Any) -> Record:
    return Record(name, words, label, group or name, "text", "none", source="here", **more)


def drawn(pictures: list[list[Path]], draws: Sequence[Draw]) -> list[Record]:
    """Records from small numbers: question 0 is a question of the record's own, picture 0 is none."""
    records = []
    for row, (question, picture, way, group, label) in enumerate(draws):
        words = WAYS[way](f"how is thing {question} done") if question else f"row {row}"
        record = text(f"row {row}", words, label=label, group=f"group {group}" if group else "")
        if picture:
            file = pictures[picture - 1][way]
            record = replace(
                record,
                prompt=CARRIERS[0],
                question=words,
                channel="picture",
                picture=file,
                image=partial(Image.open, file),
            )
        records.append(record)
    return records


def components(draws: Sequence[Draw]) -> list[set[int]]:
    """Which rows hang together, by joining sets until none overlap."""
    parts = [{row} for row in range(len(draws))]
    for one, other in itertools.combinations(range(len(draws)), 2):
        first, second = draws[one], draws[other]
        if any(first[place] and first[place] == second[place] for place in (0, 1, 3)):
            joined = [part for part in parts if one in part or other in part]
            parts = [part for part in parts if part not in joined] + [set().union(*joined)]
    return parts


# Four records in five are free of each bond, so that there is something to part.
few = st.one_of(st.just(0), st.just(0), st.integers(0, 4))
draws = st.lists(st.tuples(few, few, st.integers(0, len(WAYS) - 1), few, st.integers(0, 1)), min_size=2, max_size=24)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draws=draws, share=st.floats(0.05, 0.95), seed=st.integers(0, 9))
def test_parts_share_nothing_and_are_all(
    pictures: list[list[Path]], draws: list[Draw], share: float, seed: int
) -> None:
    records = drawn(pictures, draws)
    parts = components(draws)
    if len(parts) == 1:
        with pytest.raises(DataError, match="hang together"):
            split(records, share, seed)
        return
    train, test = split(records, share, seed)
    assert train and test
    rows = {record.name: row for row, record in enumerate(records)}
    found = [[rows[record.name] for record in part] for part in (train, test)]
    assert found[0] == sorted(found[0]) and found[1] == sorted(found[1])
    assert sorted(found[0] + found[1]) == list(range(len(records)))
    for part in parts:
        assert part <= set(found[0]) or part <= set(found[1])
    check_disjoint(train, test)
    check_disjoint(test, train)
    assert split(records, share, seed) == (train, test)
    for one, other in itertools.product(train, test):  # said once more, without any code of the split
        if one.picture and other.picture:
            assert (
                hashlib.sha256(one.picture.read_bytes()).digest() != hashlib.sha256(other.picture.read_bytes()).digest()
            )


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draws=draws)
def test_groups_are_what_hangs_together(pictures: list[list[Path]], draws: list[Draw]) -> None:
    records = drawn(pictures, draws)
    again = grouped(records)
    assert [replace(record, group="") for record in again] == [replace(record, group="") for record in records]
    found: dict[str, set[int]] = {}
    for row, record in enumerate(again):
        found.setdefault(record.group, set()).add(row)
    assert sorted(map(sorted, found.values())) == sorted(map(sorted, components(draws)))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draws=draws, cut=st.integers(1, 23))
def test_a_leak_is_found_wherever_there_is_one(pictures: list[list[Path]], draws: list[Draw], cut: int) -> None:
    records = drawn(pictures, draws)
    one, other = records[:cut], records[cut:]
    leaks = any(
        first[place] and first[place] == second[place]
        for first, second in itertools.product(draws[:cut], draws[cut:])
        for place in (0, 1)
    )
    if leaks:
        with pytest.raises(DataError, match=r"the sets leak: the (question|picture)"):
            check_disjoint(one, other)
    else:
        check_disjoint(one, other)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
def test_both_labels_come_near_to_the_share(share: float) -> None:
    draw = random.Random(0)
    records = [text(f"{n}", f"thing {n}", label=int(n % 4 == 0), group=f"{draw.randrange(150)}") for n in range(400)]
    for seed in range(3):
        train, test = split(records, share, seed)
        for label in (0, 1):
            count = sum(record.label == label for record in records)
            assert abs(sum(record.label == label for record in test) - share * count) <= 0.02 * count + 1
        check_disjoint(train, test)
    assert split(records, share, 0)[1] != split(records, share, 1)[1]


def test_a_chain_of_bonds_holds(pictures: list[list[Path]]) -> None:
    """The first shares its picture with the second, and the second its question with the third."""
    chain = drawn(pictures, [(1, 2, 0, 0, 1), (3, 2, 1, 0, 1), (3, 0, 2, 0, 0)])
    alone = text("alone", "something else")
    for seed in range(5):
        train, test = split([*chain, alone], 0.5, seed)
        assert {len(train), len(test)} == {1, 3}
    assert len({record.group for record in grouped([*chain, alone])}) == 2


def test_the_leak_is_named(pictures: list[list[Path]]) -> None:
    one, other = drawn(pictures, [(1, 2, 0, 0, 1), (3, 2, 1, 0, 1)])
    with pytest.raises(DataError) as caught:
        check_disjoint([one], [other])
    sha = hashlib.sha256(pictures[1][0].read_bytes()).hexdigest()
    said = str(caught.value)
    assert str(pictures[1][1]) in said and sha[:12] in said and "here row 0" in said
    with pytest.raises(DataError, match="the question 'HOW  is it done' is of here a and of here b"):
        check_disjoint([text("a", "How is it done?")], [text("b", "HOW  is it done")])


def test_records_that_all_hang_together() -> None:
    same = [text(str(n), "Do what the image says.") for n in range(4)]
    with pytest.raises(DataError) as caught:
        split(same, 0.5, 0)
    assert "all 4 records hang together" in str(caught.value)
    assert '"Do what the image says." is asked 4 times' in str(caught.value) and '"question"' in str(caught.value)
    for few in ([], same[:1]):
        with pytest.raises(DataError, match=f"{len(few)} records cannot be parted"):
            split(few, 0.5, 0)
    assert grouped([]) == []


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan"), 5])
def test_a_share_that_is_none(share: float) -> None:
    with pytest.raises(DataError, match="must lie between 0 and 1"):
        split([text("a", "one"), text("b", "two")], share, 0)


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("How is it done?", "  how IS it\ndone", True),
        ("STRASSE", "straße", True),
        ("ｆｕｌｌ ｗｉｄｔｈ", "full width", True),
        ("don't", "don’t", True),
        ("How is it done?", "How is it undone?", False),
        ("कि", "की", False),  # two vowel signs, which are marks and no letters
        ("version 1", "version 2", False),
        ("???", "!!!", False),
        ("???", " ??? ", True),
    ],
)
def test_what_is_the_same_question(one: str, other: str, same: bool) -> None:
    assert (normalised(one) == normalised(other)) is same


def test_a_carrier_is_no_question(tmp_path: Path) -> None:
    """Pictures under one text are different questions where they say what is asked."""
    root = miniature.figstep(tmp_path)
    records = load(f"figstep:{root}")
    train, test = split(records, 0.5, 0)
    assert len(train) == len(test) == 2 and len({record.prompt for record in records}) == 1
    with_text = load(f"figstep:{root},variant=text")
    with pytest.raises(DataError, match="leak: the question"):
        check_disjoint(train, with_text)


def test_a_picture_that_is_gone(tmp_path: Path) -> None:
    records = load(f"figstep:{miniature.figstep(tmp_path)}")
    picture = records[0].picture
    assert picture is not None
    picture.unlink()
    with pytest.raises(DataError, match=f"the picture {picture} cannot be read"):
        split(records, 0.5, 0)


def test_the_builtin_set_can_be_told_apart_from_other_data() -> None:
    """Its pictures are drawn: they are known by their pixels, and by what they ask."""
    prompts = builtin(None)[:8]
    asked_for = {asked(prompt) for prompt in prompts}
    assert len(asked_for) == 4 and not asked_for & set(CARRIERS)
    check_disjoint(prompts, [text("mine", CARRIERS[0]), text("other", "Something else entirely")])
    with pytest.raises(DataError, match="leak: the question"):
        check_disjoint(prompts, [text("mine", prompts[1].question.upper())])
    same = replace(prompts[1], question="Something else entirely")
    with pytest.raises(DataError, match="the picture drawn from its text"):
        check_disjoint(prompts, [same])


def test_copies_of_one_picture_are_one(tmp_path: Path) -> None:
    """In two data sets, under two names."""
    guard = load(f"vlguard:{miniature.vlguard(tmp_path / 'a')}")
    root = miniature.jailbreakv(tmp_path / "b")
    assert guard[0].picture is not None
    (root / "JailBreakV_28K/llm_transfer_attack/nature_2.jpeg").write_bytes(guard[0].picture.read_bytes())
    with pytest.raises(DataError, match=r"leak: the picture .*nature_2\.jpeg .* is of vlguard .* and of jailbreakv 1"):
        check_disjoint(guard, load(f"jailbreakv:{root}"))


def test_patching_with_several_data_sets(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Through the command: a file of ours and XSTest, of prompts that even a random model tells apart."""
    draw = random.Random(0)
    words = [" ".join(draw.choices(("the", "old", "dog", "house", "water", "red"), k=3 + n % 4)) for n in range(24)]
    rows = [(n + 1, f"{words[n]} {n} cake", "homonyms", "safe", "", "") for n in range(12)]
    rows += [(n + 26, f"{words[n]} {n} broken bridges", "contrast_homonyms", "unsafe", "", "") for n in range(12)]
    miniature.table(tmp_path / "xstest_prompts.csv", miniature.XSTEST_COLUMNS, rows)
    lines = [
        f'{{"prompt": "{words[n]} {n} {end}", "label": {label}, "group": "{n}"}}\n'
        for n in range(12, 24)
        for label, end in enumerate(("cake", "broken bridges"))
    ]
    (tmp_path / "mine.jsonl").write_text("".join(lines))
    specs = [f"xstest:{tmp_path}", str(tmp_path / "mine.jsonl")]
    assert len({prompt.group for prompt in calibration_prompts(specs)}) == 24

    def run(out: str, *specs: str) -> Any:
        arguments = ["--model", str(tiny_model("llava")), "--out", str(tmp_path / out), "--verify", "files"]
        arguments += ["--max-false-positive-rate", "0.1"]
        return CliRunner().invoke(main, arguments + [word for spec in specs for word in ("--calibration", spec)])

    result = run("out", *specs)
    assert result.exit_code == 0, result.output
    assert "48 prompts: AUC" in result.stderr
    assert (tmp_path / "out" / "sasa-calibration.json").exists()

    root = miniature.figstep(tmp_path / "figstep")
    result = run("none", f"figstep:{root},variant=all")
    assert result.exit_code == 1 and "Error:" in result.stderr and "Traceback" not in result.output
    assert "fewer than 5 harmless prompts" in result.stderr and "another --calibration" in result.stderr
    assert not (tmp_path / "none").exists()
