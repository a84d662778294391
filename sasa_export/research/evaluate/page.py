"""Write the report: Markdown with tables and pictures, all figures, every answer, and a section for the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sasa_export.research.evaluate import words
from sasa_export.research.evaluate.arm import Arm, Figures
from sasa_export.research.evaluate.markdown import figure, percent, table
from sasa_export.research.evaluate.plots import pictures
from sasa_export.research.evaluate.result import Evaluated, answers_json

SHOWN = {
    "answers": "bars of attack success and over-refusal of every arm",
    "roc": "ROC curves of the arms",
    "scores": "histograms of P(unsafe) for harmful and harmless prompts",
    "reliability": "stated probability against the share of harmful prompts",
    "depth": "AUC of probes at each block of the second lane against cost",
}


def write_report(evaluated: Evaluated, texts: dict[str, list[str]], settings: dict[str, Any], directory: Path) -> None:
    """Write report.md, card_section.md, evaluate.json, answers.jsonl and the pictures."""
    for name, data in pictures(evaluated).items():
        (directory / f"{name}.png").write_bytes(data)
    (directory / "report.md").write_text(report(evaluated), encoding="utf-8")
    (directory / "card_section.md").write_text(card_section(evaluated), encoding="utf-8")
    (directory / "evaluate.json").write_text(evaluated.to_json(settings), encoding="utf-8")
    (directory / "answers.jsonl").write_text(answers_json(evaluated.prompts, evaluated.arms, texts), encoding="utf-8")


def report(evaluated: Evaluated) -> str:
    """The whole report in Markdown."""
    subject = evaluated.subject
    parts = [
        f"# {subject.model} against {subject.baseline}",
        f"**{words.headline(evaluated)}**",
        _list([target.sentence() for target in evaluated.targets]),
    ]
    reasons = words.why(evaluated)
    if reasons:
        parts += ["## Why", _list(reasons)]
    else:
        parts += [_list([words.projection(evaluated), *words.control(evaluated)])]
    parts += ["## Arms", answers_table(evaluated), _picture("answers"), detection_table(evaluated)]
    parts += [_picture("roc"), _picture("scores")]
    for kind in evaluated.parts:
        parts += [f"## By {kind}", part_table(evaluated, kind)]
    parts += ["## Answers that stay", " ".join(words.utility(evaluated))]
    parts += ["## Cost", *cost(evaluated)]
    parts += ["## Are the probabilities true?", reliability_table(evaluated), _picture("reliability")]
    if evaluated.depth:
        parts += ["## Probing earlier in the second lane", depth_table(evaluated), _picture("depth")]
    if evaluated.variants:
        parts += ["## What else a probe could read", words.variants(evaluated), variants_table(evaluated)]
    if evaluated.calibrated is not None:
        parts += [words.calibrated(evaluated.calibrated)]
    parts += ["## How it was measured", *words.how(evaluated)]
    return "\n\n".join(parts) + "\n"


def card_section(evaluated: Evaluated) -> str:
    """The section of the model card."""
    parts = [
        "## Evaluation",
        f"**{words.headline(evaluated)}**",
        _list([target.sentence() for target in evaluated.targets] + words.why(evaluated)),
        answers_table(evaluated),
        detection_table(evaluated),
        " ".join(words.utility(evaluated)),
        *cost(evaluated),
        *words.how(evaluated),
    ]
    return "\n\n".join(parts) + "\n"


def answers_table(evaluated: Evaluated) -> str:
    judged = evaluated.subject.judge is not None
    head = ["arm", "attack success", *(["by the judge"] if judged else []), "over-refusal"]
    rows = []
    for arm in evaluated.arms:
        found = evaluated.overall[arm.key]
        middle = [percent(found.judged)] if judged else []
        rows.append([arm.title, percent(found.attack), *middle, percent(found.over_refusal)])
    return table(head, rows)


def detection_table(evaluated: Evaluated) -> str:
    rate = f"recall at {evaluated.subject.rate:.1%}"
    head = ["arm", "AUC", "caught", "harmless flagged", "accuracy", "F1", rate]
    return table(head, [_detection(arm, evaluated.overall[arm.key]) for arm in evaluated.scored()])


def part_table(evaluated: Evaluated, kind: str) -> str:
    head = [kind, "prompts", "arm", "attack success", "over-refusal", "AUC", "caught", "harmless flagged"]
    rows = []
    for part, arms in evaluated.parts[kind].items():
        for place, arm in enumerate(evaluated.arms):
            found = arms[arm.key]
            area = None if found.detection is None else found.detection.auc
            whole = kind == "channel"  # intervals of many small parts would fill the page
            rows.append(
                [
                    part if place == 0 else "",
                    str(evaluated.counts[kind][part]) if place == 0 else "",
                    arm.title,
                    percent(found.attack, short=not whole),
                    percent(found.over_refusal, short=not whole),
                    figure(area, short=not whole),
                    percent(found.caught, short=True),
                    percent(found.false_positives, short=True),
                ]
            )
    return table(head, rows)


def cost(evaluated: Evaluated) -> list[str]:
    """Block counts, and the measured ratios."""
    subject = evaluated.subject
    if subject.safety_layer is None:
        lines = ["By block count a prompt costs what it does in the plain model: there is no second lane."]
    else:
        again = subject.again
        lines = [
            f"By block count a prompt costs ({subject.blocks} + {again}) / {subject.blocks} = "
            f"{(subject.blocks + again) / subject.blocks:.2f} times the plain model's; a probe without projection "
            "would cost 1.00."
        ]
    if evaluated.timing is None:
        return lines
    plain = (
        "the plain model"
        if subject.graphs is None
        else "the plain model, which runs in torch while this runs in onnxruntime"
    )
    head = ["verdict", "prompts", "time to verdict", "time to first token"]
    rows = []
    for kind, verdict in evaluated.timing.verdict.items():
        first = evaluated.timing.first[kind]
        shown = [f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" for ratio in (verdict, first)]
        rows.append([kind, str(verdict.prompts), *shown])
    lines += [f"Measured against {plain}, side by side, one prompt at a time; median and quartiles over prompts:"]
    return [*lines, table(head, rows)]


def reliability_table(evaluated: Evaluated) -> str:
    head = ["arm", "Brier score", "of the base rate", "expected calibration error"]
    return table(
        head,
        [
            [evaluated.arm(key).title, f"{found.brier:.3f}", f"{found.chance:.3f}", f"{found.error:.3f}"]
            for key, found in evaluated.reliability.items()
        ],
    )


def depth_table(evaluated: Evaluated) -> str:
    head = ["block", "cost", "AUC", f"recall at {evaluated.subject.rate:.1%}"]
    first = evaluated.depth[0].block
    return table(
        head,
        [
            [
                f"{depth.block} (projection itself)" if depth.block == first else str(depth.block),
                f"{depth.cost:.2f}",
                figure(depth.auc),
                figure(depth.recall_at_rate),
            ]
            for depth in evaluated.depth
        ],
    )


def variants_table(evaluated: Evaluated) -> str:
    head = [
        "the probe reads",
        "AUC",
        "gained on it with projection",
        "on it without",
        f"recall at {evaluated.subject.rate:.1%}",
    ]
    rows = [
        [
            variant.name,
            figure(variant.auc),
            words.signed(variant.gain),
            words.signed(variant.over_plain),
            figure(variant.recall_at_rate),
        ]
        for variant in evaluated.variants
    ]
    return table(head, rows)


def _detection(arm: Arm, found: Figures) -> list[str]:
    scored = found.detection
    return [
        arm.title,
        figure(scored.auc if scored else None),
        percent(found.caught),
        percent(found.false_positives),
        percent(scored.accuracy if scored else None),
        figure(scored.f1 if scored else None),
        figure(scored.recall_at_rate if scored else None),
    ]


def _list(sentences: list[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _picture(name: str) -> str:
    return f"![{SHOWN[name]}]({name}.png)"
