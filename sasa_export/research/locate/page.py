"""What a locate run found, and the report of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sasa_export.layers.pairs import Pair
from sasa_export.layers.propose import Proposal
from sasa_export.layers.survey import Evidence
from sasa_export.research import report
from sasa_export.research.locate.pictures import depth, sweep_map


@dataclass(frozen=True)
class Located:
    """The evidence on all three capabilities, the sweep, and the layers proposed.

    Attributes:
        subject: what was looked at: the model, how it ran, the prompts, and how the report is made again.
        known: the pair that the family's file says.
        held_out: of each half of the groups, the pair chosen on the other half, and its AUC here.
    """

    subject: dict[str, Any]
    evidence: Evidence
    proposal: Proposal
    known: Pair | None
    held_out: list[tuple[Pair, float]]

    @property
    def held_out_auc(self) -> float:
        return float(np.mean([auc for _, auc in self.held_out]))


def write_report(located: Located, directory: Path) -> None:
    """Write report.html, report.md, locate.json and the pictures."""
    evidence, swept = located.evidence, located.evidence.sweep
    halves = [{"pair": pair, "auc": auc} for pair, auc in located.held_out]
    pairs = [
        {"safety_layer": pair[0], "semantic_layer": pair[1], **report.jsonable(estimate)}
        for pair, estimate in swept.pairs.items()
    ]
    figures = {
        "subject": located.subject,
        "proposal": located.proposal,
        "known": located.known,
        "held_out": {"halves": halves, "auc": located.held_out_auc},
        "safety_perception": evidence.perception,
        "semantic_understanding": evidence.understanding,
        "linguistic_expression": evidence.expression,
        "sweep": {"pairs": pairs, "without_projection": swept.plain},
    }
    title = f"Where {located.subject['model']} perceives, understands and speaks"
    pictures = {"depth": depth(evidence, located.proposal), "sweep": sweep_map(swept.pairs, located.proposal)}
    report.write_report(directory, title, markdown(located), pictures, "locate", figures)


def markdown(located: Located) -> str:
    """The report in Markdown, with the pictures beside it."""
    return report.render("locate.md.j2", located=located, **vars(located))
