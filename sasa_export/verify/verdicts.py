"""How many verdicts the type of the graphs changes: prompts of the calibration set, judged again by the graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sasa_export.probe import Calibration
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Check

SEED = 0  # of the draw
# Prompts that are judged again, and the largest share whose verdict may change: what the threshold itself may get wrong
# of the harmless ones.
JUDGED_AGAIN, MOST_CHANGED = 200, 0.02


@dataclass(frozen=True)
class ChangedVerdicts:
    """`judged` of the `whole` calibration prompts were judged again, and so many of them are now answered or refused.

    `clear` of these lay farther than the `tolerance` of P(unsafe) from the threshold, so that rounding is no reason.
    """

    judged: int
    whole: int
    now_answered: int
    now_refused: int
    clear: int
    tolerance: float

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}

    @property
    def share(self) -> float:
        return (self.now_answered + self.now_refused) / self.judged

    def check(self, most: float, *, exact: bool) -> Check:
        """Whether at most the share `most` changed and, where all is float32 (`exact`), none but by rounding."""
        drawn = f"all {self.whole}" if self.judged == self.whole else f"{self.judged} drawn from {self.whole}"
        detail = (
            f"{self.share:.1%} changed of {drawn} ({self.now_answered} now answered, {self.now_refused} now refused), "
            f"at most {most:.1%} may; {self.clear} of them farther than {self.tolerance:g} from the threshold"
        )
        passed = self.share <= most and not (exact and self.clear)
        return Check("verdicts hold over the calibration prompts", passed, detail + " (none may be)" * exact)


def draw(calibration: Calibration, count: int) -> tuple[list[Prompt], list[float]]:
    """At most `count` prompts, in order, and their P(unsafe) in the calibration.

    Labels and channels take turns, so that a small kind comes in whole.
    """
    import pandas as pd

    kinds = pd.DataFrame(
        [(prompt.label, prompt.channel) for prompt in calibration.prompts], columns=["label", "channel"]
    )
    shuffled = kinds.sample(frac=1, random_state=SEED)
    turns = shuffled.assign(turn=shuffled.groupby(["label", "channel"]).cumcount())
    rows = sorted(turns.sort_values(["turn", "label", "channel"]).index[:count])
    return [calibration.prompts[row] for row in rows], [float(calibration.final[row]) for row in rows]


def count_changed(
    before: Sequence[float], after: Sequence[float], threshold: float, tolerance: float, whole: int
) -> ChangedVerdicts:
    """Compare the graphs' P(unsafe), (judged,), with the calibration's; NaN is refused."""
    was, now = np.asarray(before), np.asarray(after)
    allowed, refused = was < threshold, ~(now < threshold)
    changed = allowed == refused
    return ChangedVerdicts(
        judged=len(was),
        whole=whole,
        now_answered=int((changed & ~allowed).sum()),
        now_refused=int((changed & allowed).sum()),
        clear=int((changed & (np.abs(was - threshold) > tolerance)).sum()),
        tolerance=tolerance,
    )
