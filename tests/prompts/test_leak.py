"""Prompts that share a picture or a question are one group, and a leak between two sets is found and named."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import rand_score

from sasa_export.errors import DataError
from sasa_export.prompts import Prompt, asked, builtin, check_disjoint, grouped, load
from sasa_export.prompts.leak import normalised

Draw = tuple[int, int, int, int]  # question, picture, way of writing both, group; 0 is one of the prompt's own

WAYS: tuple[Callable[[str], str], ...] = (
    str,
    str.upper,
    lambda text: f"  {text.replace(' ', chr(9))}?!",
    lambda text: f"«{text.title()}»",
)
few = st.one_of(st.just(0), st.just(0), st.integers(0, 4))
draws = st.lists(st.tuples(few, few, st.integers(0, len(WAYS) - 1), few), min_size=2, max_size=24)
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[list[Path]]:
    """Four pictures, each under as many names as there are ways."""
    folder = tmp_path_factory.mktemp("pictures")
    return [[miniature.picture(folder / f"{n}-{way}.png", n) for way in range(len(WAYS))] for n in range(4)]


def text(name: str, words: str, **more: Any) -> Prompt:
    return Prompt(name, words, 0, **{"group": name, "source": "here", **more})


def drawn(pictures: list[list[Path]], draws: Sequence[Draw]) -> list[Prompt]:
    """Prompts from small numbers; what is asked stands beside a picture as its question."""
    prompts = []
    for row, (question, picture, way, group) in enumerate(draws):
        words = WAYS[way](f"how is thing {question} done") if question else f"row {row}"
        prompt = text(f"row {row}", words, group=f"group {group}" if group else f"row {row}")
        if picture:
            prompt = replace(
                prompt, prompt="Do what the image says.", question=words, picture=pictures[picture - 1][way]
            )
        prompts.append(prompt)
    return prompts


def share(first: Draw, second: Draw, *places: int) -> bool:
    return any(first[place] and first[place] == second[place] for place in places)


@many
@given(draws=draws)
def test_groups_are_what_is_connected(pictures: list[list[Path]], draws: list[Draw]) -> None:
    prompts = drawn(pictures, draws)
    again = grouped(prompts)
    assert [replace(prompt, group="") for prompt in again] == [replace(prompt, group="") for prompt in prompts]
    bonds = np.array([[share(one, other, 0, 1, 3) for other in draws] for one in draws])
    assert rand_score(connected_components(bonds)[1], [prompt.group for prompt in again]) == 1.0, "the same parts"


@many
@given(draws=draws, cut=st.integers(1, 23))
def test_a_leak_is_found_wherever_there_is_one(pictures: list[list[Path]], draws: list[Draw], cut: int) -> None:
    prompts = drawn(pictures, draws)
    if any(share(first, second, 0, 1) for first, second in itertools.product(draws[:cut], draws[cut:])):
        with pytest.raises(DataError, match=r"the sets leak: the (question|picture)"):
            check_disjoint(prompts[:cut], prompts[cut:])
    else:
        check_disjoint(prompts[:cut], prompts[cut:])


def test_the_leak_is_named(pictures: list[list[Path]]) -> None:
    one, other = drawn(pictures, [(1, 2, 0, 0), (3, 2, 1, 0)])
    with pytest.raises(DataError, match=f"the picture {pictures[1][1]} is of here row 0 and of here row 1"):
        check_disjoint([one], [other])
    with pytest.raises(DataError, match="the question 'HOW  is it done' is of here a and of here b"):
        check_disjoint([text("a", "How is it done?")], [text("b", "HOW  is it done")])


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


def test_what_accompanies_a_picture_is_no_question(tmp_path: Path) -> None:
    """Pictures under one text are different questions where they say what is asked, in data sets and in ours."""
    root = miniature.figstep(tmp_path)
    figstep = load(f"figstep:{root}")
    assert len({prompt.prompt for prompt in figstep}) == 1
    assert len({prompt.group for prompt in grouped(figstep)}) == len(figstep)
    with pytest.raises(DataError, match="leak: the question"):
        check_disjoint(figstep, load(f"figstep:{root},variant=text"))
    ours = builtin()[:12]
    assert len({asked(prompt) for prompt in ours}) == 4
    shown = next(prompt for prompt in ours if prompt.question)
    check_disjoint(ours, [text("mine", ours[2].prompt)])
    with pytest.raises(DataError, match="leak: the question"):
        check_disjoint(ours, [text("mine", shown.question.upper())])
