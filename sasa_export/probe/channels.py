"""Over-refusal is limited in text and in pictures alike, with one threshold.

Pictures that a model hardly reads have noisier scores than text, and a threshold that bears with these would let text
pass. What the score of a picture has to be lowered by is folded into the probe, which sees whether there is one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sasa_export.probe.fit import threshold_of
from sasa_export.prompts.prompt import Prompt

CHANNELS = ("text", "picture")
PENALTY = 1.0  # of the ridge regression
FARTHEST = 1e-9  # from 0 and 1, so that a certain score has a finite logit

Linear = tuple[np.ndarray, float]  # weight (features,) and bias


def picture_detector(states: np.ndarray, prompts: Sequence[Prompt]) -> Linear:
    """A ridge regression that puts out 1 for a prompt with a picture and 0 for one without.

    On states (prompts, features); zero where all prompts are of one channel.
    """
    from sklearn.linear_model import Ridge

    picture = np.array([prompt.channel == "picture" for prompt in prompts], dtype=float)
    if picture.min() == picture.max():
        return np.zeros(states.shape[1]), 0.0
    model = Ridge(alpha=PENALTY).fit(states, picture)
    return model.coef_, float(model.intercept_)


def lower_pictures(scores: np.ndarray, detected: np.ndarray, by: float) -> np.ndarray:
    """P(unsafe), (prompts,), with the logits of pictures lowered by so much.

    Args: detected: what `picture_detector` puts out, (prompts,).
    """
    from scipy.special import expit, logit

    if not by:
        return scores
    return expit(logit(np.clip(scores, FARTHEST, 1 - FARTHEST)) - by * detected)


def picture_offset(scores: np.ndarray, prompts: Sequence[Prompt], rate: float) -> float:
    """How much higher, in logits, the threshold for pictures is than that for text; 0 where either has few prompts.

    Args: as of `threshold_of`, which gives both.
    """
    from scipy.special import logit

    limits = []
    for channel in CHANNELS:
        rows = [row for row, prompt in enumerate(prompts) if prompt.channel == channel]
        ordinary = sum(prompts[row].label == 0 and not prompts[row].borderline for row in rows)
        if rate * ordinary < 1:
            return 0.0
        limits.append(threshold_of(scores[rows], [prompts[row] for row in rows], rate))
    return float(logit(limits[1]) - logit(limits[0]))
