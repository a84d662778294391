"""Everything that a locate run found, as one frozen value and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from sasa_export.research.locate.alignment import Alignment
from sasa_export.research.locate.expression import Expression
from sasa_export.research.locate.heads import HeadScores
from sasa_export.research.locate.pairs import Pair
from sasa_export.research.locate.propose import Proposal
from sasa_export.research.locate.separability import Separability
from sasa_export.research.locate.sweep import Sweep


@dataclass(frozen=True)
class Subject:
    """What was looked at: the model, how it ran, and the prompts. `command` makes the report again, where one did."""

    model: str
    family: str
    blocks: int
    hidden: int
    dtype: str
    device: str
    harmful: int
    harmless: int
    groups: int
    source: str  # of the prompts
    command: str = ""


@dataclass(frozen=True)
class Example:
    """The five tokens that the logit lens ranks first behind each block, for one prompt."""

    prompt: str
    words: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class HeldOut:
    """What the choice of a pair is worth on prompts that took no part in it: for each half of the groups, the pair
    that the other half would choose by the same rule, and its AUC here."""

    pairs: tuple[Pair, Pair]
    aucs: tuple[float, float]

    @property
    def auc(self) -> float:
        return float(np.mean(self.aucs))

    def to_json(self) -> dict[str, Any]:
        return {
            "halves": [
                {"pair": list(pair), "auc": round(auc, 4)} for pair, auc in zip(self.pairs, self.aucs, strict=True)
            ],
            "auc": round(self.auc, 4),
        }


@dataclass(frozen=True)
class Located:
    """The evidence on all three capabilities, the sweep, and the layers proposed. `tsne` holds, for each block that is
    drawn, the points (prompts, 2) of the prompts numbered `drawn`."""

    subject: Subject
    separability: Separability
    alignment: Alignment | None
    expression: Expression
    heads: HeadScores | None
    sweep: Sweep
    held_out: HeldOut
    known: Pair | None
    proposal: Proposal
    example: Example
    tsne: dict[int, np.ndarray]
    drawn: tuple[tuple[int, str], ...]  # label and channel of each point

    def to_json(self) -> str:
        """All figures; the points of the t-SNE pictures are no figures and stay out."""
        data = {
            "tool": f"sasa-export {version('sasa-export')}",
            "subject": vars(self.subject),
            "proposal": self.proposal.to_json(),
            "known": None if self.known is None else list(self.known),
            "held_out": self.held_out.to_json(),
            "safety_perception": self.separability.to_json(),
            "safety_heads": None if self.heads is None else self.heads.to_json(),
            "semantic_understanding": None if self.alignment is None else self.alignment.to_json(),
            "linguistic_expression": self.expression.to_json(),
            "sweep": self.sweep.to_json(),
            "example": {"prompt": self.example.prompt, "words": [list(words) for words in self.example.words]},
        }
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"
