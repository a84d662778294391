"""What a locate run found, and the report of it: one page that opens without a network, Markdown, and all figures."""

from __future__ import annotations

import json
from dataclasses import dataclass, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sasa_export.prompts.prompt import Prompt
from sasa_export.research.locate.expression import is_readable
from sasa_export.research.locate.heads import HeadScores
from sasa_export.research.locate.interval import Estimate, is_below
from sasa_export.research.locate.pairs import Pair
from sasa_export.research.locate.pictures import pictures
from sasa_export.research.locate.propose import Proposal, spans
from sasa_export.research.locate.survey import Evidence
from sasa_export.research.report import html_page, plain, render

LISTED = 10  # safety heads


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


def write_report(located: Located, directory: Path) -> None:
    """Write report.html, report.md, locate.json and the pictures."""
    drawn = pictures(located)
    for name, data in drawn.items():
        (directory / f"{name}.png").write_bytes(data)
    text = markdown(located)
    (directory / "report.html").write_text(html_page(located.title, text, drawn), encoding="utf-8")
    (directory / "report.md").write_text(text, encoding="utf-8")
    (directory / "locate.json").write_text(located.to_json(), encoding="utf-8")


def markdown(located: Located) -> str:
    """The report in Markdown, with the pictures beside it."""
    heads, swept = located.heads, located.evidence.sweep
    chosen = swept.pairs[located.proposal.pair]
    lens = pd.DataFrame([map(shown, texts) for texts in located.example["words"]])
    lens.columns = [f"{place + 1}." for place in lens.columns]
    lens.insert(0, "block", range(len(lens)))
    return render(
        "locate.md.j2",
        located=located,
        proposal=located.proposal,
        evidence=located.evidence,
        chosen=chosen,
        together_is_better=is_below(chosen, swept.together),
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
    cell = plain(letters[:16]) or "·"
    return f"**{cell}**" if is_readable(letters) else cell
