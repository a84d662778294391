"""The sweep: how well a probe on each pair's second lane tells harmful from harmless, and which pairs are as good."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from sasa_export.probe.fit import CANDIDATES, best_regularization, in_metric, quick_fit
from sasa_export.prompts.prompt import Prompt
from sasa_export.research.locate.interval import Estimate, auc_of, is_below
from sasa_export.research.locate.pairs import Pair
from sasa_export.research.locate.passes import Lanes


@dataclass(frozen=True)
class Sweep:
    """Cross-validated AUC of the probe with each pair's projection, and of the probe without any.

    `scores` holds P(unsafe) of every prompt (prompts,) by a probe on the pair that did not see its group. `together` is
    the AUC of the mean of all pairs' log-odds.
    """

    pairs: dict[Pair, Estimate]
    plain: Estimate
    scores: dict[Pair, np.ndarray]
    together: Estimate | None = None

    def best(self) -> Pair:
        return max(self.pairs, key=lambda pair: self.pairs[pair].value)

    def tied(self, candidates: Sequence[Pair]) -> list[Pair]:
        """The candidates that are not below the best of them by more than noise."""
        best = max(candidates, key=lambda pair: self.pairs[pair].value)
        return [pair for pair in candidates if not is_below(self.pairs[pair], self.pairs[best], len(candidates))]

    def to_json(self) -> dict[str, Any]:
        pairs = [
            {"safety_layer": safety, "semantic_layer": semantic, **estimate.to_json()}
            for (safety, semantic), estimate in self.pairs.items()
        ]
        together = {} if self.together is None else {"all_pairs_together": self.together.to_json()}
        return {"pairs": pairs, "without_projection": self.plain.to_json(), **together}


def rotated(features: np.ndarray, metric: np.ndarray) -> np.ndarray:
    """Features (prompts, hidden) in the head's metric, and turned into as few dimensions as they span.

    A logistic regression with an L2 penalty gives the same scores after a rotation, and is done much sooner.
    """
    left, scale, _ = np.linalg.svd(in_metric(features, metric), full_matrices=False)
    return left * scale


def sweep(
    lanes: Lanes,
    prompts: Sequence[Prompt],
    pairs: Sequence[Pair],
    metric: np.ndarray,
    *,
    regularization: float | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Sweep:
    """Fit and cross-validate each pair's probe.

    The features are normed states in the head's metric, as in calibration; where a model caps its logits, they are
    those before the cap. `regularization` is the probe's C; None chooses it as calibration does.
    """
    labels = np.array([prompt.label for prompt in prompts])
    groups = [prompt.group for prompt in prompts]
    candidates = CANDIDATES if regularization is None else (regularization,)

    def scored(features: np.ndarray) -> np.ndarray:
        _, scores = best_regularization(rotated(features, metric), labels, groups, candidates, quick_fit)
        advance(1)
        return scores

    scores = {pair: scored(lanes.projected(pair)) for pair in pairs}
    return Sweep(
        {pair: auc_of(found, labels, groups) for pair, found in scores.items()},
        auc_of(scored(lanes.plain()), labels, groups),
        scores,
        auc_of(np.mean([_odds(found) for found in scores.values()], axis=0), labels, groups),
    )


def _odds(scores: np.ndarray) -> np.ndarray:
    inside = np.clip(scores, 1e-6, 1 - 1e-6)
    return np.log(inside / (1 - inside))


def halves(prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of two halves that share no group, the kinds of groups in equal numbers; always the same ones."""
    labels: dict[str, set[int]] = {}
    for prompt in prompts:
        labels.setdefault(prompt.group, set()).add(prompt.label)
    # Shuffled within a kind, so that a set sorted by category does not put every second category aside.
    order = sorted(labels, key=lambda group: (sorted(labels[group]), Random(group).random()))
    first = set(order[::2])
    inside = np.array([prompt.group in first for prompt in prompts])
    return np.flatnonzero(inside), np.flatnonzero(~inside)
