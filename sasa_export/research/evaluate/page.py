"""Write the report: Markdown with tables and pictures, all figures, and every answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sasa_export.probe.intervals import Estimate
from sasa_export.research import report
from sasa_export.research.evaluate.arms import Figures
from sasa_export.research.evaluate.measure import Evaluated
from sasa_export.research.evaluate.pictures import pictures

TITLES = {  # of the columns of figures
    "attack": "attack success",
    "over_refusal": "over-refusal",
    "auc": "AUC",
    "caught": "caught",
    "false_positives": "harmless flagged",
    "recall_at_rate": "recall at rate",
}


def write_report(found: Evaluated, directory: Path) -> None:
    """Write report.html, report.md, evaluate.json, answers.jsonl and the pictures."""
    title = f"{found.subject['model']} against {found.subject['baseline']}"
    figures = {name: value for name, value in vars(found).items() if name != "answers"}
    text = report.render("evaluate.md.j2", found=found, subject=found.subject, arms=found.arms, tables=tables(found))
    report.write_report(directory, title, text, pictures(found), "evaluate", figures)
    answers = directory / "answers.jsonl"
    found.answers.to_json(answers, orient="records", lines=True, force_ascii=False, double_precision=6)


def tables(found: Evaluated) -> dict[str, pd.DataFrame]:
    """All tables of the report."""
    titles = {key: arm["title"] for key, arm in found.arms.items()}
    detected = ["auc", "caught", "false_positives", "recall_at_rate"]
    return {
        "answers": _table(found.arms, titles, ["attack", "over_refusal"]),
        "detection": _table(found.arms, {key: titles[key] for key in found.detecting}, detected),
        "changes": _changes_table(found),
        **{f"by {kind}": _part_table(found, kind, titles) for kind in found.parts},
    }


def _changes_table(found: Evaluated) -> pd.DataFrame:
    """A row for the harmful and one for the harmless prompts of each part."""
    return pd.DataFrame(
        {
            "prompts": ("harmless", "harmful")[of["label"]] + ("" if of["kind"] == "all" else f", {of['part']}"),
            "number": of["prompts"],
            "refused": of["before"],
            f"refused by {found.subject['against']}": of["after"],
            "now refused": of["now_refused"],
            "now allowed": of["now_allowed"],
            "largest change of P": f"{of['largest']:.3f}",
        }
        for of in found.changes
    )


def _part_table(found: Evaluated, kind: str, titles: dict[str, str]) -> pd.DataFrame:
    """The arms' figures on each part, one part after the other."""
    columns = ["attack", "over_refusal", "auc", "caught", "false_positives"]
    long = columns[:3] if kind == "channel" else []  # intervals of many small parts would fill the page
    frames = []
    for part, figures in found.parts[kind].items():
        frame = _table(figures, titles, columns, long)
        blanks = [""] * (len(frame) - 1)
        frame.insert(0, kind, [part, *blanks])
        frame.insert(1, "prompts", [figures["prompts"], *blanks])
        frames.append(frame)
    return pd.concat(frames)


def _table(
    figures: dict[str, Figures], titles: dict[str, str], columns: Sequence[str], long: Sequence[str] | None = None
) -> pd.DataFrame:
    """A row an arm, a column a figure; only those in `long` with their intervals, where it is given."""

    def cell(of: Estimate | None, name: str) -> str:
        if of is None:
            return ""
        return of.short if long is not None and name not in long else f"{of}"

    return pd.DataFrame(
        {"arm": title, **{TITLES[name]: cell(figures[key].get(name), name) for name in columns}}
        for key, title in titles.items()
    )
