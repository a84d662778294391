"""The sweep: how well a probe on each pair's second lane does, which pair to choose, and what the choice is worth."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sasa_export.layers.pairs import Pair
from sasa_export.layers.prompts import halves
from sasa_export.probe.fit import CANDIDATES, best_regularization, in_metric
from sasa_export.probe.folds import folds_of
from sasa_export.probe.intervals import Comparable, auc_of, within_noise
from sasa_export.probe.work import Results
from sasa_export.prompts.prompt import Prompt
from sasa_export.prompts.shares import labels_and_groups
from sasa_export.report import Silent


@dataclass(frozen=True)
class Sweep:
    """Cross-validated AUC of the probe with each pair's projection, and `plain`, of the probe without any.

    `scores` holds P(unsafe) of every prompt (prompts,) by a probe on the pair that did not see its group.
    """

    pairs: dict[Pair, Comparable]
    plain: Comparable
    scores: dict[Pair, np.ndarray]

    def tied(self, candidates: Sequence[Pair]) -> list[Pair]:
        """The candidates that are not below the best of them by more than noise."""
        return within_noise({pair: self.pairs[pair] for pair in candidates})


def second_lane(pair: Pair) -> str:
    """The name under which `survey` keeps the normed state of a pair's second lane, (prompts, hidden)."""
    return f"lane-{pair[0]}-{pair[1]}"


def sweep(
    results: Results, pairs: Sequence[Pair], metric: np.ndarray, regularization: float | None, report: Silent
) -> Sweep:
    """Fit and cross-validate each pair's probe.

    The features are normed states in the head's metric (hidden, hidden), as in calibration; where a model caps its
    logits, they are those before the cap. `regularization` is the probe's C; None chooses it as calibration does.
    """
    labels, groups = labels_and_groups(results.prompts)
    folds = folds_of(results.prompts)
    candidates = CANDIDATES if regularization is None else (regularization,)

    def scored(name: str) -> np.ndarray:
        # A logistic regression with an L2 penalty gives the same scores after a rotation into as few dimensions as
        # the features span, and is done much sooner.
        left, scale, _ = np.linalg.svd(in_metric(results.read(name), metric), full_matrices=False)
        return best_regularization(left * scale, labels, folds, candidates)[1]  # (prompts,)

    scores = {}
    with report.bar(len(pairs), "sweep") as advance:
        for pair in pairs:
            scores[pair] = scored(second_lane(pair))
            advance(1)
    areas = {pair: auc_of(found, labels, groups) for pair, found in scores.items()}
    return Sweep(areas, auc_of(scored("plain"), labels, groups), scores)


def cheapest(pairs: Sequence[Pair]) -> Pair:
    """The pair with the shortest second lane, then with the earliest semantic layer."""
    return min(pairs, key=lambda pair: (-pair[0], pair[1]))


def held_out(swept: Sweep, candidates: Sequence[Pair], prompts: Sequence[Prompt]) -> list[tuple[Pair, float]]:
    """What the choice among the candidates is worth on prompts that took no part in it.

    For each half of the groups: the pair that the other half would choose by the same rule, and its AUC here.
    """
    labels, groups = labels_and_groups(prompts)

    def auc(pair: Pair, rows: np.ndarray) -> Comparable:
        return auc_of(swept.scores[pair][rows], labels[rows], groups[rows])

    first, second = halves(prompts)
    found = []
    for chosen_on, judged_on in ((first, second), (second, first)):
        pair = cheapest(within_noise({pair: auc(pair, chosen_on) for pair in candidates}))
        found.append((pair, auc(pair, judged_on).value))
    return found
