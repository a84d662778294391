"""A verdict should not depend on the setting: a probe pays for telling one request apart from itself elsewhere.

Behind a greeting, under a system prompt or alone, a request is the same. What changes between its prompts is measured
in the calibration set, and the probe is penalised for reading it, beside the usual penalty (within-class covariance
normalisation: Hatch et al., Interspeech 2006).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sasa_export.prompts.prompt import Prompt, asked

STRENGTH = 30.0  # of 0, 3 and 30, by the log loss on kinds left out; smol-llava's texts


def steady_metric(states: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray | None:
    """M, (features, features), with |w M^-1|² = |w|² + STRENGTH * what w reads of settings, in units of its mean.

    On states (prompts, features) of which the texts that are asked more than once count; None where there are none.
    """
    rows, labels = _repeated(prompts)
    if not len(rows):
        return None
    sums = np.zeros((labels.max() + 1, states.shape[1]))
    np.add.at(sums, labels, states[rows])
    apart = states[rows] - (sums / np.bincount(labels)[:, None])[labels]  # (texts, features)
    scatter = apart.T @ apart / len(rows)  # (features, features)
    mean = np.trace(scatter) / len(scatter)
    if mean == 0:
        return None
    return np.linalg.inv(np.linalg.cholesky(np.eye(len(scatter)) + STRENGTH * scatter / mean))


def _repeated(prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of texts whose request is asked as text more than once, and the request of each, (texts,)."""
    rows = np.array([row for row, prompt in enumerate(prompts) if prompt.channel == "text"], dtype=int)
    requests = [f"{prompts[row].group}/{asked(prompts[row])}" for row in rows]
    _, labels, counts = np.unique(requests, return_inverse=True, return_counts=True)
    again = counts[labels] > 1
    return rows[again], np.unique(labels[again], return_inverse=True)[1]
