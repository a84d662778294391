"""How many verdicts a type changes: prompts drawn, changes counted, and held to the limit."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sasa_export.prompts.prompt import Prompt
from sasa_export.verify import verdicts
from sasa_export.verify.verdicts import check_changed, draw

NAN = float("nan")


def calibration(kinds: list[tuple[int, str]]) -> Any:
    """As much of one as a draw needs: prompts of these labels and channels, P(unsafe) rising from 0."""
    prompts = [
        Prompt(f"prompt {row}", "words", label, str(row), channel, "none") for row, (label, channel) in enumerate(kinds)
    ]
    return SimpleNamespace(prompts=prompts, final=np.arange(len(prompts)) / len(prompts))


def test_a_draw_takes_labels_and_channels_evenly_and_is_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "JUDGED_AGAIN", 40)
    given = calibration([(int(row < 90), "picture" if row % 3 == 0 else "text") for row in range(100)])
    prompts, scores = draw(given)
    counts = Counter((prompt.label, prompt.channel) for prompt in prompts)
    assert counts[0, "picture"] == 4 and counts[0, "text"] == 6, "a small kind comes in whole"
    assert counts[1, "picture"] == counts[1, "text"] == 15
    assert (prompts, scores) == draw(given)
    assert [given.prompts[round(100 * score)] for score in scores] == prompts, "each with its own score"
    few = calibration([(0, "text")] * 7)
    assert draw(few) == (few.prompts, [*few.final]), "a small set is judged whole"


@pytest.mark.parametrize(
    ("before", "after", "answered", "refused", "clear"),
    [
        ([0.4, 0.4, 0.6, 0.6, 0.5], [0.6, 0.4, 0.4, 0.6, 0.49], 2, 1, 2),
        ([0.4, 0.6], [NAN, NAN], 0, 1, 1),
        ([0.50005, 0.4], [0.49995, 0.4], 1, 0, 0),
        ([0.502, 0.4], [0.49995, 0.4], 1, 0, 1),
    ],
    ids=["both ways", "NaN is refused", "by rounding", "not by rounding"],
)
def test_changes_are_counted(before: list[float], after: list[float], answered: int, refused: int, clear: int) -> None:
    detail = check_changed(before, after, 0.5, 1e-4, whole=9, exact=False).detail
    share = (answered + refused) / len(before)
    counted = f"{share:.1%} changed of {len(before)} drawn from 9 ({answered} now answered, {refused} now refused)"
    assert detail.startswith(counted) and f"; {clear} of them farther than 0.0001" in detail


@pytest.mark.parametrize(
    ("before", "after", "most", "exact", "passed"),
    [
        (0.4, 0.6, 0.02, False, True),
        (0.4, 0.6, 0.019, False, False),
        (0.4, 0.6, 0.02, True, False),
        (0.50005, 0.49995, 0.02, True, True),
        (0.50005, 0.49995, 0.0, True, False),
    ],
    ids=["few enough", "too many", "in float32", "in float32 by rounding", "no share excuses rounding"],
)
def test_what_is_too_many(
    before: float, after: float, most: float, exact: bool, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 50 changes; where all is float32, only rounding may change a verdict."""
    monkeypatch.setattr(verdicts, "MOST_CHANGED", most)
    rest = [0.4] * 49
    check = check_changed([before, *rest], [after, *rest], 0.5, 1e-4, whole=50, exact=exact)
    assert check.passed is passed
    assert check.detail.startswith("2.0% changed of all 50 (") and f"at most {most:.1%} may" in check.detail
