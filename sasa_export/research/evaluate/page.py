"""Write the report: Markdown with tables and pictures, all figures, every answer, and a section for the model card."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from sasa_export.research.evaluate.arms import Figures
from sasa_export.research.evaluate.estimates import Estimate
from sasa_export.research.evaluate.measure import Evaluated
from sasa_export.research.evaluate.pictures import pictures
from sasa_export.research.report import render

TITLES = {  # of the columns of figures
    "attack": "attack success",
    "judged": "by the judge",
    "over_refusal": "over-refusal",
    "auc": "AUC",
    "caught": "caught",
    "false_positives": "harmless flagged",
    "accuracy": "accuracy",
    "f1": "F1",
    "recall_at_rate": "recall at rate",
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
    data = json.dumps(found.to_json(), indent=1, ensure_ascii=False, default=vars)
    (directory / "evaluate.json").write_text(f"{data}\n", encoding="utf-8")
    answers(found, texts).to_json(directory / "answers.jsonl", orient="records", lines=True, force_ascii=False)


def tables(found: Evaluated) -> dict[str, pd.DataFrame]:
    """All tables of the report."""
    titles = {key: arm.title for key, arm in found.arms.items()}
    answered = [name for name in ("attack", "judged", "over_refusal") if name in found.figures["plain"]]
    detected = ["auc", "caught", "false_positives", "accuracy", "f1", "recall_at_rate"]
    errors = ("brier", "brier_of_the_base_rate", "expected_calibration_error")
    reliable = [[titles[key], *(f"{of[name]:.3f}" for name in errors)] for key, of in found.reliability.items()]
    timing = [[kind, of.prompts, f"{of.verdict:.2f}", f"{of.first_token:.2f}"] for kind, of in found.timing.items()]
    depth = [[of.block, f"{of.cost:.2f}", f"{of.auc}", f"{of.recall_at_rate}"] for of in found.depth]
    return {
        "answers": _table(found.figures, titles, answered),
        "detection": _table(found.figures, {key: titles[key] for key in found.reliability}, detected),
        "reliability": pd.DataFrame(
            reliable, columns=["arm", "Brier score", "of the base rate", "expected calibration error"]
        ),
        "timing": pd.DataFrame(timing, columns=["verdict", "prompts", "time to verdict", "time to first token"]),
        "depth": pd.DataFrame(depth, columns=["block", "cost", "AUC", "recall at rate"]),
        **{f"by {kind}": _part_table(found, kind, titles) for kind in found.parts},
    }


def _part_table(found: Evaluated, kind: str, titles: dict[str, str]) -> pd.DataFrame:
    """The arms' figures on each part, one part after the other."""
    columns = ["attack", "over_refusal", "auc", "caught", "false_positives"]
    long = columns[:3] if kind == "channel" else []  # intervals of many small parts would fill the page
    frames = []
    for part, figures in found.parts[kind].items():
        frame = _table(figures, titles, columns, long)
        blanks = [""] * (len(frame) - 1)
        frame.insert(0, kind, [part, *blanks])
        frame.insert(1, "prompts", [found.counts[kind][part], *blanks])
        frames.append(frame)
    return pd.concat(frames)


def _table(
    figures: dict[str, Figures], titles: dict[str, str], columns: list[str], long: list[str] | None = None
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
