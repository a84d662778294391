"""What a locate run found, and the report of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sasa_export.layers.expression import is_readable
from sasa_export.layers.heads import HeadScores
from sasa_export.layers.pairs import Pair
from sasa_export.layers.propose import Proposal, spans
from sasa_export.layers.survey import Evidence
from sasa_export.research import report

LISTED = 10  # safety heads


@dataclass(frozen=True)
class Located:
    """The evidence on all three capabilities, the sweep, and the layers proposed.

    Attributes:
        subject: what was looked at: the model, how it ran, and the prompts; `command` makes the report again.
        known: the pair that the family's file says.
        held_out: of each half of the groups, the pair chosen on the other half, and its AUC here.
        example: a `prompt`, and for each block the five likeliest tokens behind it, as `words`.
    """

    subject: dict[str, Any]
    evidence: Evidence
    heads: HeadScores | None
    proposal: Proposal
    known: Pair | None
    held_out: list[tuple[Pair, float]]
    example: dict[str, Any]

    @property
    def held_out_auc(self) -> float:
        return float(np.mean([auc for _, auc in self.held_out]))


def write_report(located: Located, pictures: dict[str, bytes], directory: Path) -> None:
    """Write report.html, report.md, locate.json and the pictures."""
    title = f"Where {located.subject['model']} perceives, understands and speaks"
    report.write_report(directory, title, markdown(located), pictures, "locate", figures(located))


def figures(located: Located) -> dict[str, Any]:
    """All figures."""
    evidence, swept = located.evidence, located.evidence.sweep
    halves = [{"pair": pair, "auc": auc} for pair, auc in located.held_out]
    pairs = [
        {"safety_layer": pair[0], "semantic_layer": pair[1], **report.jsonable(estimate)}
        for pair, estimate in swept.pairs.items()
    ]
    return {
        "subject": located.subject,
        "proposal": located.proposal,
        "known": located.known,
        "held_out": {"halves": halves, "auc": located.held_out_auc},
        "safety_perception": evidence.perception,
        "safety_heads": located.heads,
        "semantic_understanding": evidence.understanding,
        "linguistic_expression": evidence.expression,
        "sweep": {"pairs": pairs, "without_projection": swept.plain},
        "example": located.example,
    }


def markdown(located: Located) -> str:
    """The report in Markdown, with the pictures beside it."""
    heads = located.heads
    lens = pd.DataFrame([map(shown, texts) for texts in located.example["words"]])
    lens.columns = [f"{place + 1}." for place in lens.columns]
    lens.insert(0, "block", range(len(lens)))
    return report.render(
        "locate.md.j2",
        located=located,
        subject=located.subject,
        proposal=located.proposal,
        evidence=located.evidence,
        heads=heads,
        ablated="" if heads is None else spans(heads.blocks),
        foremost=None if heads is None else _foremost(heads),
        lens=lens,
    )


def _foremost(heads: HeadScores) -> pd.DataFrame:
    """The safety heads with the highest scores."""
    return pd.DataFrame(
        {
            "block": found.block,
            "head": found.head,
            "degrees, harmful": f"{heads.degrees_harmful[heads.blocks.index(found.block), found.head]:.2f}",
            "degrees, ordinary": f"{heads.degrees_ordinary[heads.blocks.index(found.block), found.head]:.2f}",
        }
        for found in heads.safety_heads[:LISTED]
    )


def shown(text: str) -> str:
    """A token in a table: bold where it is readable, control characters and what does not print as a middle dot."""
    letters = "".join(letter if letter.isprintable() and letter != "\ufffd" else "·" for letter in text.strip(" "))
    cell = report.plain(letters[:16]) or "·"
    return f"**{cell}**" if is_readable(letters) else cell
