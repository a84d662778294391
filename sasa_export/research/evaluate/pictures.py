"""The pictures of a report; every function gives the bytes of a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sasa_export.research.evaluate.estimates import Estimate
from sasa_export.research.evaluate.measure import Evaluated
from sasa_export.research.evaluate.targets import ATTACK, OVER_REFUSAL
from sasa_export.research.theme import LIGHT, drawing, png

COLOURS = {"patched": LIGHT.safety, "with": LIGHT.semantic, "without": LIGHT.semantic, "words": LIGHT.harmless}
BINS = np.linspace(0, 1, 41)
BORDERLINE = "borderline"  # the category or attack of harmless prompts that are made to look harmful


def pictures(found: Evaluated) -> dict[str, bytes]:
    """All pictures by name."""
    drawn = {"answers": bars(found), "roc": roc(found), "scores": scores(found), "reliability": reliability(found)}
    return {**drawn, "depth": depth(found)} if found.depth else drawn


def bars(found: Evaluated) -> bytes:
    """Attack success rate and over-refusal of every arm, with intervals and targets."""
    titles = [arm.title.replace(" (", "\n(") for arm in found.arms.values()]
    with drawing(LIGHT, 1.2 + 0.52 * len(titles)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        figures = list(found.figures.values())
        _bars(left, [of["attack"] for of in figures], LIGHT.harmful, ATTACK)
        _bars(right, [of["over_refusal"] for of in figures], LIGHT.harmless, OVER_REFUSAL)
        left.set_yticks(range(len(titles)), titles)
        left.invert_yaxis()
        left.set_title("Attack success")
        right.set_title("Over-refusal")
        return png(figure)


def _bars(axis: Any, shares: Sequence[Estimate], colour: str, target: float) -> None:
    for place, share in enumerate(shares):
        axis.barh(place, 100 * share.value, 0.62, color=colour, alpha=0.85)
        axis.plot([100 * share.low, 100 * share.high], [place, place], "|-", color=LIGHT.ink, linewidth=1)
        axis.annotate(f"{share.value:.1%}", (100 * share.high, place), (6, 0), textcoords="offset points",
                      va="center", fontsize=9)  # fmt: skip
    axis.axvline(100 * target, color=LIGHT.third, linewidth=1, linestyle=":")
    # Each side has its own scale, or the bars of a small share could not be told apart.
    axis.set_xlim(0, 125 * max([share.high for share in shares] + [0.1]))
    axis.set_xlabel(f"% (dotted: target, {target:.0%})")
    axis.tick_params(axis="y", length=0)


def roc(found: Evaluated) -> bytes:
    """The ROC curve of every arm that detects, with the point at its threshold."""
    from sklearn.metrics import roc_curve

    with drawing(LIGHT, 5.2, 5.6) as figure:
        axis = _unit_square(figure)
        for key, colour in COLOURS.items():
            if key not in found.arms:
                continue
            arm, of = found.arms[key], found.figures[key]
            wrong, caught, _ = roc_curve(found.labels, arm.scores, drop_intermediate=False)
            area = f", AUC {of['auc'].value:.3f}" if "auc" in of else ""
            axis.plot(wrong, caught, color=colour, linewidth=1.8, label=f"{arm.title}{area}")
            if "caught" in of:
                axis.plot(of["false_positives"].value, of["caught"].value, "o", color=colour, markersize=7)
        axis.set_xlabel("share of harmless prompts flagged")
        axis.set_ylabel("share of harmful prompts flagged")
        axis.set_title("Large dots: the threshold of the calibration")
        axis.legend(loc="lower right", fontsize=8.5)
        return png(figure)


def scores(found: Evaluated) -> bytes:
    """How the scores of harmful and harmless prompts lie, for every arm that detects."""
    labels = found.labels
    near = np.array([BORDERLINE in f"{prompt.attack} {prompt.category}" for prompt in found.prompts])
    kinds = [
        ("harmless", LIGHT.harmless, (labels == 0) & ~near),
        ("harmless, borderline", LIGHT.safety, (labels == 0) & near),
        ("harmful", LIGHT.harmful, labels == 1),
    ]
    arms = [arm for arm in found.arms.values() if arm.scores is not None]
    with drawing(LIGHT, 0.9 + 1.6 * len(arms)) as figure:
        axes = figure.subplots(len(arms), 1, sharex=True)
        for axis, arm in zip(axes, arms, strict=True):
            for name, colour, rows in kinds:
                if rows.any():
                    shown = {"weights": np.full(rows.sum(), 100 / rows.sum()), "color": colour}
                    axis.hist(arm.scores[rows], BINS, alpha=0.45, label=name, **shown)
                    axis.hist(arm.scores[rows], BINS, histtype="step", linewidth=1.2, **shown)
            if arm.threshold is not None:
                axis.axvline(arm.threshold, color=LIGHT.ink, linewidth=1.2, linestyle="--")
            axis.set_title(arm.title, fontsize=10)
            axis.set_ylabel("% of kind")
            axis.set_xlim(0, 1)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=9)
        axes[-1].set_xlabel("P(unsafe); dashed: the threshold of the calibration")
        return png(figure)


def reliability(found: Evaluated) -> bytes:
    """Whether the probabilities are true: what each arm says against what is so, bin by bin."""
    with drawing(LIGHT, 5.0, 5.6) as figure:
        axis = _unit_square(figure)
        for key, of in found.reliability.items():
            said, share, prompts = (
                np.array([one[name] for one in of["bins"]]) for name in ("said", "found", "prompts")
            )
            label = f"{found.arms[key].title}, error {of['expected_calibration_error']:.3f}"
            axis.plot(said, share, color=COLOURS[key], linewidth=1.2, label=label)
            axis.scatter(said, share, 12 + 260 * prompts / len(found.prompts), color=COLOURS[key])
        axis.set_xlabel("P(unsafe), mean of a bin")
        axis.set_ylabel("share of harmful prompts in it")
        axis.set_title("Dotted: as it should be; large dots: many prompts")
        axis.legend(loc="upper left", fontsize=8.5)
        return png(figure)


def depth(found: Evaluated) -> bytes:
    """The AUC of probing at each block of the second lane, against the blocks that the prompt runs through."""
    depths, areas = found.depth, [of.auc for of in found.depth]
    costs = [of.cost for of in depths]
    with drawing(LIGHT, 3.8) as figure:
        axis = figure.subplots()
        axis.fill_between(costs, [area.low for area in areas], [area.high for area in areas], color=LIGHT.safety,
                          alpha=0.18, linewidth=0)  # fmt: skip
        axis.plot(costs, [area.value for area in areas], "o-", color=LIGHT.safety, label="probe in the lane")
        for key in ("without", "words"):
            if "auc" in found.figures.get(key, {}):
                area, name = found.figures[key]["auc"].value, found.arms[key].title
                axis.axhline(area, color=COLOURS[key], linewidth=1.2, linestyle="--", label=name)
        for of in (depths[0], depths[len(depths) // 2], depths[-1]):
            axis.annotate(f"block {of.block}", (of.cost, of.auc.value), (0, 8), textcoords="offset points",
                          ha="center", fontsize=8.5)  # fmt: skip
        axis.set_xlabel("blocks that a prompt runs through (1: as in the plain model)")
        axis.set_ylabel("AUC, with its 95 % interval")
        axis.set_title("Probing earlier in the second lane")
        axis.legend(loc="best", fontsize=8.5)
        return png(figure)


def _unit_square(figure: Any) -> Any:
    """Axes from 0 to 1 with the diagonal."""
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color=LIGHT.faint, linewidth=1, linestyle=":")
    axis.set_xlim(-0.02, 1.02)
    axis.set_ylim(-0.02, 1.02)
    axis.set_aspect("equal")
    return axis
