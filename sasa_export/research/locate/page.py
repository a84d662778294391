"""The report: one page that opens without a network, its pictures, the same in Markdown, and all figures."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from sasa_export.research.locate.expression import is_readable
from sasa_export.research.locate.heads import HeadScores
from sasa_export.research.locate.interval import is_below
from sasa_export.research.locate.pictures import pictures
from sasa_export.research.locate.propose import spans
from sasa_export.research.locate.result import Located
from sasa_export.research.report import html_page, plain, render

LISTED = 10  # safety heads


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
