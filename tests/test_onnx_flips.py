"""How many verdicts a type turns over: drawn, counted, held to the limit, and told where none were."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sasa_export.options import Options
from sasa_export.prompts.prompt import Prompt
from sasa_export.verify.flips import Reference, check_flips, count_flips, reference
from sasa_export.writers.onnx import card


def prompt(number: int, label: int = 0, channel: str = "text") -> Prompt:
    return Prompt(f"prompt {number}", "words", label, f"{number}", channel, "none")


class Calibrated:
    """As much of a calibration as a reference needs."""

    def __init__(self, prompts: list[Prompt]) -> None:
        self.prompts = prompts
        self.final = np.arange(len(prompts)) / len(prompts)


def sample(prompts: list[Prompt], count: int) -> Reference:
    calibration: Any = Calibrated(prompts)
    return reference(calibration, count=count, most=0.02, dtype="float32")


def wanted(scores: list[float], most: float = 0.02, dtype: str = "float32") -> Reference:
    return Reference(tuple(prompt(number) for number in range(len(scores))), tuple(scores), len(scores), dtype, most)


def verdict(before: list[float], after: list[float], *, most: float = 0.0, dtype: str = "float16") -> Any:
    given = wanted(before, most)
    found = count_flips(given, after, 0.5, dtype)
    return found, check_flips(found, given, after, 0.5, 1e-4)


def test_a_small_set_is_judged_whole() -> None:
    prompts = [prompt(number) for number in range(7)]
    taken = sample(prompts, 7)
    assert taken.prompts == tuple(prompts)
    assert np.allclose(taken.scores, np.arange(7) / 7)


def test_a_sample_takes_labels_and_channels_evenly_and_is_the_same_each_time() -> None:
    prompts = [prompt(number, int(number < 90), "picture" if number % 3 == 0 else "text") for number in range(100)]
    taken = sample(prompts, 40)
    counts = Counter((item.label, item.channel) for item in taken.prompts)
    assert sum(counts.values()) == 40 and taken.whole == 100
    assert counts[0, "picture"] == 4 and counts[0, "text"] == 6, "a small kind comes in whole"
    assert counts[1, "picture"] == counts[1, "text"] == 15
    assert taken.prompts == sample(prompts, 40).prompts
    by_name = dict(zip([item.name for item in prompts], np.arange(100) / 100, strict=True))
    assert [by_name[item.name] for item in taken.prompts] == list(taken.scores)


def test_flips_of_both_directions_are_counted() -> None:
    found, _ = verdict([0.4, 0.4, 0.6, 0.6, 0.5], [0.6, 0.4, 0.4, 0.6, 0.49])
    assert (found.prompts, found.allowed, found.refused, found.share) == (5, 2, 1, 0.6)
    found, _ = verdict([0.4, 0.4], [0.4, float("nan")])
    assert (found.allowed, found.refused) == (0, 1), "NaN is refused"


def test_what_is_too_many() -> None:
    before, after = [0.4] * 50, [0.6] + [0.4] * 49
    assert verdict(before, after, most=0.02)[1].passed
    assert not verdict(before, after, most=0.019)[1].passed
    assert "2.0% flipped of all 50 (0 now answered, 1 now refused), at most 1.9% may" in (
        verdict(before, after, most=0.019)[1].detail
    )


def test_in_float32_only_rounding_may_flip() -> None:
    assert verdict([0.50005], [0.49995], most=0.99, dtype="float32")[0].share == 1.0
    assert not verdict([0.50005], [0.49995], most=0.99, dtype="float32")[1].passed, "no share may reach the limit"
    near, far = [0.50005] + [0.4] * 9, [0.502] + [0.4] * 9
    after = [0.49995] + [0.4] * 9
    assert verdict(near, after, most=0.1, dtype="float32")[1].passed
    assert not verdict(far, after, most=0.1, dtype="float32")[1].passed
    assert verdict(far, after, most=0.1, dtype="float16")[1].passed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_flips": -0.1}, "--max-flips is -0.1;"),
        ({"max_flips": 1.0}, "--max-flips is 1;"),
        ({"max_flips": float("nan")}, "--max-flips is nan;"),
        ({"flip_prompts": 0}, "--flip-prompts is 0;"),
    ],
)
def test_limits_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=re.escape(said)):
        Options(model="none", out=Path("out"), **options).check()


def test_what_is_said_where_none_were_counted() -> None:
    assert "the probe was given" in card.not_counted(Options(probe=Path("probe")))
    assert "were not run" in card.not_counted(Options(verify="files"))
