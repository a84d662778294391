"""`sasa-export evaluate`."""

from __future__ import annotations

from typing import Any

import click

from sasa_export.flags import flags
from sasa_export.report import Console, quiet
from sasa_export.research.evaluate.options import EvaluateOptions


@click.command("evaluate")
@flags(EvaluateOptions)
def evaluate_command(**values: Any) -> None:
    """Measure what a patched model refuses, and what it still answers as before.

    Arms side by side on the same prompts: the plain model, the patched model, a probe without projection, and words
    alone. Writes report.html, which opens without a network, with its pictures, report.md, evaluate.json,
    answers.jsonl and card_section.md. An interrupted run goes on where it stopped when the same command is given again;
    accelerate launch spreads it over processes.
    """
    quiet()
    from sasa_export.research.evaluate.run import evaluate

    evaluate(EvaluateOptions(**values), Console())
