"""How many verdicts the type of the graphs changes: prompts of the calibration set, judged again by the graphs."""

from collections.abc import Sequence

import numpy as np

from sasa_export.probe import Calibration
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Check

SEED = 0  # of the draw
# Prompts that are judged again, and the largest share whose verdict may change: what the threshold itself may get wrong
# of the harmless ones.
JUDGED_AGAIN, MOST_CHANGED = 200, 0.02


def draw(calibration: Calibration) -> tuple[list[Prompt], list[float]]:
    """At most JUDGED_AGAIN prompts, in order, and their P(unsafe) in the calibration.

    Labels and channels take turns, so that a small kind comes in whole.
    """
    import pandas as pd

    kinds = pd.DataFrame(
        [(prompt.label, prompt.channel) for prompt in calibration.prompts], columns=["label", "channel"]
    )
    shuffled = kinds.sample(frac=1, random_state=SEED)
    turns = shuffled.assign(turn=shuffled.groupby(["label", "channel"]).cumcount())
    rows = sorted(turns.sort_values(["turn", "label", "channel"]).index[:JUDGED_AGAIN])
    return [calibration.prompts[row] for row in rows], [float(calibration.final[row]) for row in rows]


def check_changed(
    before: Sequence[float], after: Sequence[float], threshold: float, tolerance: float, whole: int, *, exact: bool
) -> Check:
    """Compare the graphs' P(unsafe), (judged,), with the calibration's of its `whole` prompts; NaN is refused.

    At most the share MOST_CHANGED of the verdicts may change and, where all is float32 (`exact`), none but by rounding:
    none that lay farther than the `tolerance` from the threshold.
    """
    was, now = np.asarray(before), np.asarray(after)
    allowed, refused = was < threshold, ~(now < threshold)
    changed = allowed == refused
    clear = int((changed & (np.abs(was - threshold) > tolerance)).sum())
    share = float(changed.mean())
    drawn = f"all {whole}" if len(was) == whole else f"{len(was)} drawn from {whole}"
    detail = (
        f"{share:.1%} changed of {drawn} ({(changed & ~allowed).sum()} now answered, {(changed & allowed).sum()} now "
        f"refused), at most {MOST_CHANGED:.1%} may; {clear} of them farther than {tolerance:g} from the threshold"
    )
    passed = share <= MOST_CHANGED and not (exact and clear)
    return Check("verdicts hold over the calibration prompts", passed, detail + " (none may be)" * exact)
