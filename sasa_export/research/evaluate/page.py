"""Write the report: Markdown with tables and pictures, all figures, every answer, and a section for the model card."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from sasa_export.research.evaluate.arms import Figures
from sasa_export.research.evaluate.measure import Evaluated
from sasa_export.research.evaluate.pictures import pictures
from sasa_export.research.report import render

COLUMNS = {  # of the tables: title and form by figure
    "attack": ("attack success", ".1%"),
    "judged": ("by the judge", ".1%"),
    "over_refusal": ("over-refusal", ".1%"),
    "auc": ("AUC", ".3f"),
    "caught": ("caught", ".1%"),
    "false_positives": ("harmless flagged", ".1%"),
    "accuracy": ("accuracy", ".1%"),
    "f1": ("F1", ".3f"),
    "recall_at_rate": ("recall at rate", ".3f"),
}


def write_report(found: Evaluated, texts: dict[str, list[str]], directory: Path) -> None:
    """Write report.md, card_section.md, evaluate.json, answers.jsonl and the pictures.

    `texts` are the answers of the plain and the patched model.
    """
    for name, data in pictures(found).items():
        (directory / f"{name}.png").write_bytes(data)
    for template, name in (("evaluate_report.md.j2", "report.md"), ("evaluate_card.md.j2", "card_section.md")):
        page = render(template, found=found, subject=found.subject, figures=found.figures, tables=tables(found))
        (directory / name).write_text(page, encoding="utf-8")
    data = json.dumps(found.to_json(), indent=1, ensure_ascii=False)
    (directory / "evaluate.json").write_text(f"{data}\n", encoding="utf-8")
    answers(found, texts).to_json(directory / "answers.jsonl", orient="records", lines=True, force_ascii=False)


def tables(found: Evaluated) -> dict[str, pd.DataFrame]:
    """All tables of the report."""
    answered = [name for name in ("attack", "judged", "over_refusal") if name in found.figures["plain"]]
    detected = ["auc", "caught", "false_positives", "accuracy", "f1", "recall_at_rate"]
    arms = {key: arm.title for key, arm in found.arms.items()}
    scored = {key: title for key, title in arms.items() if key != "plain"}
    return {
        "answers": _table(found.figures, arms, answered),
        "detection": _table(found.figures, scored, detected),
        "reliability": pd.DataFrame(
            {
                "arm": arms[key],
                "Brier score": f"{of.brier:.3f}",
                "of the base rate": f"{of.brier_of_the_base_rate:.3f}",
                "expected calibration error": f"{of.expected_calibration_error:.3f}",
            }
            for key, of in found.reliability.items()
        ),
        "timing": pd.DataFrame(
            {
                "verdict": kind,
                "prompts": of.prompts,
                "time to verdict": f"{of.verdict:.2f}",
                "time to first token": f"{of.first_token:.2f}",
            }
            for kind, of in found.timing.items()
        ),
        "depth": pd.DataFrame(
            {
                "block": f"{of.block} (projection itself)" if of is found.depth[0] else of.block,
                "cost": f"{of.cost:.2f}",
                "AUC": f"{of.auc:.3f}",
                "recall at rate": f"{of.recall_at_rate:.3f}",
            }
            for of in found.depth
        ),
        **{f"by {kind}": _part_table(found, kind, arms) for kind in found.parts},
    }


def _part_table(found: Evaluated, kind: str, arms: dict[str, str]) -> pd.DataFrame:
    """The figures of every part of a kind, one after the other. Intervals of many small parts would fill the page."""
    wide = ["attack", "over_refusal", "auc"] if kind == "channel" else []
    columns = ["attack", "over_refusal", "auc", "caught", "false_positives"]
    frames = []
    for name, part in found.parts[kind].items():
        frame = _table(part.figures, arms, columns, short=[column for column in columns if column not in wide])
        blanks = [""] * (len(frame) - 1)
        frame.insert(0, kind, [name, *blanks])
        frame.insert(1, "prompts", [str(part.prompts), *blanks])
        frames.append(frame)
    return pd.concat(frames)


def _table(
    figures: dict[str, Figures], arms: dict[str, str], columns: list[str], short: list[str] | None = None
) -> pd.DataFrame:
    """A row an arm; those in `short` without their intervals, and what was not measured is empty."""

    def cell(key: str, name: str) -> str:
        found, form = figures[key].get(name), COLUMNS[name][1]
        if found is None:
            return ""
        return format(found.value if short and name in short else found, form)

    return pd.DataFrame(
        {"arm": title, **{COLUMNS[name][0]: cell(key, name) for name in columns}} for key, title in arms.items()
    )


def answers(found: Evaluated, texts: dict[str, list[str]]) -> pd.DataFrame:
    """A row a prompt: what was asked, what was answered, and what each arm made of it."""
    asked = ("name", "label", "channel", "attack", "category", "prompt", "question")
    frame = pd.DataFrame([{name: getattr(prompt, name) for name in asked} for prompt in found.prompts])
    for key, said in texts.items():
        frame[f"{key}_answer"] = said
    for key, arm in found.arms.items():
        frame[f"{key}_refused"] = arm.refused
        if arm.complied is not None:
            frame[f"{key}_complied"] = arm.complied
        if arm.scores is not None:
            frame[f"{key}_unsafe_probability"] = arm.scores.round(6)
    return frame
