"""Over-refusal is limited alike in text, in pictures and in long text, with one threshold.

Pictures that a model hardly reads have noisier scores than text, and so has long text. A threshold that bears with
these would let short text pass. What the score of such a prompt has to be lowered by is folded into the probe, which
sees whether it is one.
"""

from collections.abc import Sequence

import numpy as np

from sasa_export.probe.fit import threshold_of
from sasa_export.prompts.prompt import Prompt

CHANNELS = ("text", "picture")
MARKS = 2  # a picture, long text
LONG = 60  # words of a conversation from which on it is long
PENALTY = 1.0  # of the ridge regression
FARTHEST = 1e-9  # from 0 and 1, so that a certain score has a finite logit

Linear = tuple[np.ndarray, float]  # weight (features,) and bias
Detector = tuple[np.ndarray, np.ndarray]  # weight (MARKS, features) and bias (MARKS,)


def marks(prompts: Sequence[Prompt]) -> np.ndarray:
    """Whether each prompt has a picture, and whether it is long, (prompts, MARKS), bool."""

    def words(prompt: Prompt) -> int:
        return sum(len(text.split()) for text in (*(text for _, text in prompt.before), prompt.prompt))

    return np.array([(prompt.channel == "picture", words(prompt) >= LONG) for prompt in prompts])


def detector(states: np.ndarray, prompts: Sequence[Prompt]) -> Detector:
    """A ridge regression that puts out 1 for a prompt with a mark and 0 for one without.

    On states (prompts, features); zero for a mark that all prompts have, or none.
    """
    from sklearn.linear_model import Ridge

    marked = marks(prompts).astype(float)  # (prompts, MARKS)
    model, told = Ridge(alpha=PENALTY).fit(states, marked), marked.min(0) < marked.max(0)
    return model.coef_ * told[:, None], model.intercept_ * told


def lowered(scores: np.ndarray, detected: np.ndarray, by: np.ndarray) -> np.ndarray:
    """P(unsafe), (prompts,), with the logits of prompts lowered by so much for each mark, (MARKS,).

    Args: detected: what `detector` puts out, (prompts, MARKS).
    """
    from scipy.special import expit, logit

    if not by.any():
        return scores
    return expit(logit(np.clip(scores, FARTHEST, 1 - FARTHEST)) - detected @ by)


def offsets(scores: np.ndarray, prompts: Sequence[Prompt], rate: float) -> np.ndarray:
    """How much higher, in logits, the threshold is for prompts with one mark alone than for those with none, (MARKS,).

    0 where either are few. Args: as of `threshold_of`, which gives all.
    """
    from scipy.special import logit

    marked, found = marks(prompts), np.zeros(MARKS)  # (prompts, MARKS)
    plain = _limit(scores, prompts, marked.sum(1) == 0, rate)
    for mark in range(MARKS):
        limit = _limit(scores, prompts, marked[:, mark] & (marked.sum(1) == 1), rate)
        if limit is not None and plain is not None:
            found[mark] = logit(limit) - logit(plain)
    return found


def _limit(scores: np.ndarray, prompts: Sequence[Prompt], of: np.ndarray, rate: float) -> float | None:
    """The threshold for some prompts, (prompts,), bool; None where they have few ordinary ones."""
    rows = np.flatnonzero(of)
    some = [prompts[int(row)] for row in rows]
    if rate * sum(prompt.label == 0 and not prompt.borderline for prompt in some) < 1:
        return None
    return threshold_of(scores[rows], some, rate)
