"""Are the probabilities true? The Brier score, and the expected calibration error over ten bins (Guo et al. 2017)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

BINS = 10


def reliability(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Of P(unsafe) (prompts,) and labels (prompts,).

    `brier` is the mean squared error, `brier_of_the_base_rate` that of always saying the share of harmful prompts, and
    `expected_calibration_error` the mean distance between what the bins say and what is so, by number of prompts.
    `bins`, of equal width, are those that hold `prompts`: `said` is their mean P(unsafe), `found` the share of harmful
    ones.
    """
    place = np.clip((scores * BINS).astype(int), 0, BINS - 1)  # (prompts,)
    frame = pd.DataFrame({"said": scores, "found": labels}).groupby(place)
    bins = frame.agg(said=("said", "mean"), found=("found", "mean"), prompts=("said", "size"))
    rate = float(labels.mean())
    return {
        "brier": float(((scores - labels) ** 2).mean()),
        "brier_of_the_base_rate": rate * (1 - rate),
        "expected_calibration_error": float(((bins.said - bins.found).abs() * bins.prompts).sum() / len(labels)),
        "bins": bins.to_dict("records"),
    }
