"""Everything that a locate run found, as one frozen value and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, is_dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from sasa_export.prompts.prompt import Prompt
from sasa_export.research.locate.heads import HeadScores
from sasa_export.research.locate.interval import Estimate
from sasa_export.research.locate.pairs import Pair
from sasa_export.research.locate.propose import Proposal
from sasa_export.research.locate.survey import Evidence


@dataclass(frozen=True)
class Located:
    """The evidence on all three capabilities, the sweep, and the layers proposed.

    Attributes:
        subject: what was looked at: the model, how it ran, and the prompts; `command` makes the report again.
        known: the pair that the family's file says.
        held_out: of each half of the groups, the pair chosen on the other half, and its AUC here.
        example: a `prompt`, and for each block the five likeliest tokens behind it, as `words`.
        tsne: for each block that is drawn, the points (prompts, 2) of the prompts `drawn`.
    """

    subject: dict[str, Any]
    evidence: Evidence
    heads: HeadScores | None
    proposal: Proposal
    known: Pair | None
    held_out: list[tuple[Pair, float]]
    example: dict[str, Any]
    tsne: dict[int, np.ndarray]
    drawn: list[Prompt]

    @property
    def title(self) -> str:
        return f"Where {self.subject['model']} perceives, understands and speaks"

    @property
    def held_out_auc(self) -> float:
        return float(np.mean([auc for _, auc in self.held_out]))

    def to_json(self) -> str:
        """All figures; the points of the t-SNE pictures are no figures and stay out."""
        evidence, swept = self.evidence, self.evidence.sweep
        pairs = [
            {"safety_layer": pair[0], "semantic_layer": pair[1], **_jsonable(estimate)}
            for pair, estimate in swept.pairs.items()
        ]
        data = {
            "tool": f"sasa-export {version('sasa-export')}",
            "subject": self.subject,
            "proposal": self.proposal,
            "known": self.known,
            "held_out": {
                "halves": [{"pair": pair, "auc": auc} for pair, auc in self.held_out],
                "auc": self.held_out_auc,
            },
            "safety_perception": evidence.perception,
            "safety_heads": self.heads,
            "semantic_understanding": evidence.understanding,
            "linguistic_expression": evidence.expression,
            "sweep": {"pairs": pairs, "without_projection": swept.plain, "all_pairs_together": swept.together},
            "example": self.example,
        }
        return json.dumps(_jsonable(data), indent=1, ensure_ascii=False) + "\n"


def _jsonable(value: Any) -> Any:
    """Plain data, its numbers to four digits."""
    if isinstance(value, Estimate):
        value = {"value": value.value, "low": value.low, "high": value.high}
    elif is_dataclass(value):
        value = vars(value)
    elif isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: _jsonable(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value
