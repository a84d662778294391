"""The sweep: measure a probe on each pair's second lane, choose a pair, and evaluate the choice on held-out prompts."""

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
    """The cross-validated AUC of a probe with each pair's projection, and of a probe without projection (`plain`).

    `scores` holds P(unsafe) of every prompt, (prompts,), by a probe on the pair fitted without the prompt's group.
    """

    pairs: dict[Pair, Comparable]
    plain: Comparable
    scores: dict[Pair, np.ndarray]

    def tied(self, candidates: Sequence[Pair]) -> list[Pair]:
        """Return the candidates within noise of the best candidate."""
        return within_noise({pair: self.pairs[pair] for pair in candidates})


def second_lane(pair: Pair) -> str:
    """Return the name under which `survey` keeps the normed states of a pair's second lane, (prompts, hidden)."""
    return f"lane-{pair[0]}-{pair[1]}"


def sweep(
    results: Results, pairs: Sequence[Pair], metric: np.ndarray, regularization: float | None, report: Silent
) -> Sweep:
    """Return the sweep: each pair's probe, fitted and cross-validated.

    The features are normed states in the head's metric (hidden, hidden), as in calibration. They stand for the logits
    before any cap. `regularization` is the probe's C; None chooses it as calibration does.
    """
    labels, groups = labels_and_groups(results.prompts)
    folds = folds_of(results.prompts)
    candidates = CANDIDATES if regularization is None else (regularization,)

    def scored(name: str) -> np.ndarray:
        # Rotating the features into the dimensions they span leaves the scores of a logistic regression with an L2
        # penalty unchanged, and makes the fit much faster.
        left, scale, _ = np.linalg.svd(in_metric(results.read(name), metric), full_matrices=False)
        return best_regularization(left * scale, labels, folds, candidates)[1]  # (prompts,)

    scores = {}
    with report.bar(len(pairs), "sweep") as advance:
        for pair in pairs:
            scores[pair] = scored(second_lane(pair))
            advance(1)
    areas = {pair: auc_of(of_pair, labels, groups) for pair, of_pair in scores.items()}
    return Sweep(areas, auc_of(scored("plain"), labels, groups), scores)


def cheapest(pairs: Sequence[Pair]) -> Pair:
    """Return the pair with the shortest second lane; among equals, the one with the earliest semantic layer."""
    return min(pairs, key=lambda pair: (-pair[0], pair[1]))


def held_out(swept: Sweep, candidates: Sequence[Pair], prompts: Sequence[Prompt]) -> list[tuple[Pair, float]]:
    """Return, for each half of the groups, the pair chosen on the other half and its AUC on this half.

    The pair is the cheapest candidate within noise of the best. The AUC is of prompts that took no part in the choice.
    """
    labels, groups = labels_and_groups(prompts)

    def auc(pair: Pair, rows: np.ndarray) -> Comparable:
        return auc_of(swept.scores[pair][rows], labels[rows], groups[rows])

    first, second = halves(prompts)
    judged = []
    for chosen_on, judged_on in ((first, second), (second, first)):
        pair = cheapest(within_noise({pair: auc(pair, chosen_on) for pair in candidates}))
        judged.append((pair, auc(pair, judged_on).value))
    return judged
