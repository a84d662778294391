"""Everything that an evaluation found, as one frozen value and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from sasa_export.prompts.prompt import Prompt
from sasa_export.research.evaluate.arm import Arm, Figures
from sasa_export.research.evaluate.depth import Depth
from sasa_export.research.evaluate.reliability import Reliability
from sasa_export.research.evaluate.shares import Interval, Share
from sasa_export.research.evaluate.targets import Target
from sasa_export.research.evaluate.timing import Timing
from sasa_export.research.evaluate.variants import Calibrated, Variant


@dataclass(frozen=True)
class Subject:
    """What was evaluated, on what, and how it ran.

    `again` is how many blocks the second lane has, or all of them together, `rate` the chosen false-positive rate;
    `threshold` the patched model's where it was given, and not chosen for that rate; `command` makes the report again.
    """

    model: str
    baseline: str
    family: str
    format: str
    graphs: str | None
    safety_layer: int | None
    semantic_layer: int | None
    further_pairs: tuple[tuple[int, int], ...]
    blocks: int
    again: int
    rate: float
    threshold: float | None
    dtype: str
    device: str
    harmful: int
    harmless: int
    groups: int
    data: str
    left_out: int
    calibrated_on: str
    judge: str | None
    tokens: int
    batch_size: int
    command: str


@dataclass(frozen=True)
class Utility:
    """`identical`: harmless prompts that the patched model allows, answered token for token as by the original.

    `spelled`: flagged prompts that are answered with the refusal. `cut`: harmless prompts that the patched model allows
    and whose answer it ends with the refusal; None where only prompts are judged.
    """

    identical: Share | None
    spelled: Share | None
    cut: Share | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: None if value is None else value.to_json() for name, value in vars(self).items()}


@dataclass(frozen=True)
class Evaluated:
    """All arms' figures, over all prompts and on their parts.

    Attributes:
        parts: figures by kind of part, part, and arm: `parts["channel"]["text"]["patched"]`.
        best: attack success rate and over-refusal at the best threshold, which is chosen on these very prompts.
        gain: differences of AUC. "projection": a probe with it less one without, both fitted here alike; "model": the
            patched model less words alone.
        fitted: threshold, strength of regularization and cross-validated AUC of the arms that were fitted here.
    """

    subject: Subject
    prompts: tuple[Prompt, ...]
    arms: tuple[Arm, ...]
    overall: dict[str, Figures]
    parts: dict[str, dict[str, dict[str, Figures]]]
    counts: dict[str, dict[str, int]]
    targets: tuple[Target, ...]
    best: tuple[float, float] | None
    gain: dict[str, Interval]
    fitted: dict[str, dict[str, Any]]
    utility: Utility
    reliability: dict[str, Reliability]
    timing: Timing | None
    depth: tuple[Depth, ...]
    variants: tuple[Variant, ...] = ()
    calibrated: Calibrated | None = None

    @property
    def labels(self) -> np.ndarray:
        return np.array([prompt.label for prompt in self.prompts])

    def arm(self, key: str) -> Arm:
        return next(arm for arm in self.arms if arm.key == key)

    def scored(self) -> list[Arm]:
        """The arms that detect, in order."""
        return [arm for arm in self.arms if arm.scores is not None]

    def to_json(self, settings: dict[str, Any]) -> str:
        """All figures; `settings` are the options that were given."""
        data = {
            "tool": f"sasa-export {version('sasa-export')}",
            "settings": settings,
            "subject": vars(self.subject),
            "targets": [target.to_json() for target in self.targets],
            "best_threshold_in_hindsight": None
            if self.best is None
            else {"attack": round(self.best[0], 4), "over_refusal": round(self.best[1], 4)},
            "arms": {
                arm.key: {"title": arm.title, "threshold": arm.threshold, **self.overall[arm.key].to_json()}
                for arm in self.arms
            },
            "fitted": self.fitted,
            "auc_gained_by": {what: gain.to_json() for what, gain in self.gain.items()},
            "utility": self.utility.to_json(),
            "reliability": {arm: found.to_json() for arm, found in self.reliability.items()},
            "timing": None if self.timing is None else self.timing.to_json(),
            "depth_curve": [depth.to_json() for depth in self.depth],
            "variants": [variant.to_json() for variant in self.variants],
            "calibrated_probabilities": None if self.calibrated is None else self.calibrated.to_json(),
            "parts": {
                kind: {
                    part: {"prompts": self.counts[kind][part], **{arm: found.to_json() for arm, found in arms.items()}}
                    for part, arms in parts.items()
                }
                for kind, parts in self.parts.items()
            },
        }
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def answers_json(prompts: Sequence[Prompt], arms: Sequence[Arm], texts: dict[str, list[str]]) -> str:
    """One JSON object a prompt: what was asked, what was answered, and what each arm made of it."""
    lines = []
    for row, prompt in enumerate(prompts):
        entry: dict[str, Any] = {
            "name": prompt.name, "label": prompt.label, "channel": prompt.channel, "attack": prompt.attack,
            "category": prompt.category, "prompt": prompt.prompt, "question": prompt.question,
            "answers": {key: answers[row] for key, answers in texts.items()},
        }  # fmt: skip
        entry["arms"] = {
            arm.key: {
                "refused": bool(arm.refused[row]),
                **({} if arm.complied is None else {"complied": bool(arm.complied[row])}),
                **({} if arm.scores is None else {"unsafe_probability": round(float(arm.scores[row]), 6)}),
            }
            for arm in arms
        }
        lines.append(json.dumps(entry, ensure_ascii=False))
    return "\n".join(lines) + "\n"
