"""Are the probabilities true? The Brier score, and the expected calibration error over ten bins (Guo et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

BINS = 10


@dataclass(frozen=True)
class Reliability:
    """Of P(unsafe): `brier` is the mean squared error, `brier_of_the_base_rate` that of always saying the share of
    harmful prompts, `expected_calibration_error` the mean distance between what the bins say and what is so, by
    number of prompts.

    `bins` are those that hold prompts: mean P(unsafe) `said`, share of harmful prompts `found`, number of `prompts`.
    """

    brier: float
    brier_of_the_base_rate: float
    expected_calibration_error: float
    bins: list[dict[str, float]]


def reliability(scores: np.ndarray, labels: np.ndarray) -> Reliability:
    """Of P(unsafe) (prompts,) and labels (prompts,), in bins of equal width."""
    place = np.clip((scores * BINS).astype(int), 0, BINS - 1)  # (prompts,)
    bins = (
        pd.DataFrame({"said": scores, "found": labels})
        .groupby(place)
        .agg(said=("said", "mean"), found=("found", "mean"), prompts=("said", "size"))
    )
    rate = float(labels.mean())
    return Reliability(
        float(((scores - labels) ** 2).mean()),
        rate * (1 - rate),
        float(((bins.said - bins.found).abs() * bins.prompts).sum() / len(labels)),
        bins.to_dict("records"),
    )
