"""How many verdicts a type changes: prompts drawn, changes counted, and held to the limit."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sasa_export.prompts.prompt import Prompt
from sasa_export.verify import compare
from sasa_export.verify.compare import check_changed, draw

NAN = float("nan")


def calibration(kinds: list[tuple[int, str]]) -> Any:
    """As much of one as a draw needs: prompts of these labels and channels, P(unsafe) rising from 0."""
    prompts = [
        Prompt(f"prompt {row}", "words", label, str(row), channel, "none") for row, (label, channel) in enumerate(kinds)
    ]
    return SimpleNamespace(prompts=prompts, final=np.arange(len(prompts)) / len(prompts))


def test_a_draw_takes_labels_and_channels_evenly_and_is_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "JUDGED_AGAIN", 40)
    given = calibration([(int(row < 90), "picture" if row % 3 == 0 else "text") for row in range(100)])
    prompts, scores = draw(given)
    counts = Counter((prompt.label, prompt.channel) for prompt in prompts)
    assert counts[0, "picture"] == 4 and counts[0, "text"] == 6, "a small kind comes in whole"
    assert counts[1, "picture"] == counts[1, "text"] == 15
    assert (prompts, scores) == draw(given)
    assert [given.prompts[round(100 * score)] for score in scores] == prompts, "each with its own score"
    few = calibration([(0, "text")] * 7)
    assert draw(few) == (few.prompts, [*few.final]), "a small set is judged whole"


REST = [0.4] * 48
FEW, MANY = [0.4, 0.4, *REST], [0.6, 0.4, *REST]


@pytest.mark.parametrize(
    ("before", "after", "counted", "clear", "passed"),
    [
        (FEW, MANY, "2.0% changed of all 50 (0 now answered, 1 now refused)", 1, (True, False)),
        (FEW[:40], MANY[:40], "2.5% changed of 40 drawn from 50 (0 now answered, 1 now refused)", 1, (False, False)),
        (
            [0.6, 0.5, *REST],
            [0.4, 0.49, *REST],
            "4.0% changed of all 50 (2 now answered, 0 now refused)",
            1,
            (False,) * 2,
        ),
        ([0.4, 0.6], [NAN, NAN], "50.0% changed of 2 drawn from 50 (0 now answered, 1 now refused)", 1, (False, False)),
        ([0.50005, 0.4, *REST], [0.49995, 0.4, *REST], "2.0% changed of all 50 (1 now answered", 0, (True, True)),
        ([0.502, 0.4, *REST], [0.49995, 0.4, *REST], "2.0% changed of all 50 (1 now answered", 1, (True, False)),
    ],
    ids=["few enough", "too many", "answered", "NaN is refused", "by rounding", "not by rounding"],
)
def test_changes_are_counted_and_held_to_the_limit(
    before: list[float], after: list[float], counted: str, clear: int, passed: tuple[bool, bool]
) -> None:
    """`passed`: as other types may change a few, and where all is float32, in which only rounding may change one."""
    for exact, right in zip((False, True), passed, strict=True):
        check = check_changed(before, after, 0.5, 1e-4, whole=50, exact=exact)
        assert check.passed is right
        assert check.detail.startswith(counted) and f"; {clear} of them farther than 0.0001" in check.detail
        assert "at most 2.0% may" in check.detail
