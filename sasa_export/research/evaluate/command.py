"""`sasa-export evaluate`: flags and help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("evaluate")
@click.option(
    "--model",
    required=True,
    type=click.Path(path_type=Path),
    help="The patched directory, of safetensors or of ONNX graphs.",
)
@click.option("--baseline", help="The model it was made from. Default: what its sasa-export.json names.")
@click.option(
    "--data",
    multiple=True,
    help="Labelled prompts: a JSONL file, or a data set of the field as name:PATH. May be given several times. "
    "Default: the built-in evaluation set.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to write the report to.")
@click.option("--force", is_flag=True, help="Replace the report that is there, and discard other unfinished work.")
@click.option(
    "--calibration",
    multiple=True,
    help="What the arms without projection and of words alone are fitted on. Default: what the patched model was "
    "calibrated on.",
)
@click.option(
    "--judge",
    help="A further judge, module:function, called with the request and the answer: True where the answer complies. "
    "It runs code of yours.",
)
@click.option("--limit", type=click.INT, help="About how many prompts to use. Default: all.")
@click.option("--max-new-tokens", type=click.INT, default=32, show_default=True, help="Longest answer.")
@click.option("--depth-curve", is_flag=True, help="Also probe at every block of the second lane.")
@click.option(
    "--variants",
    is_flag=True,
    help="Also measure other probes: on the ends of both lanes, on the last few tokens, and calibrated probabilities.",
)
@click.option(
    "--timing", type=click.INT, default=12, show_default=True, help="Prompts to time both models on; 0 leaves it out."
)
@click.option("--batch-size", type=click.INT, default=16, show_default=True, help="Prompts at a time.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Where the models run: auto, cpu, cuda, cuda:1 ..., or spread, over all devices, memory and disk, as auto "
    "does where one device has no room for the model.",
)
@click.option(
    "--dtype",
    type=click.Choice(("auto", "float32", "bfloat16", "float16")),
    default="auto",
    show_default=True,
    help="Type the models run in.",
)
def evaluate_command(**flags: Any) -> None:
    """Measure what a patched model refuses, and what it still answers as before.

    Arms side by side on the same prompts: the plain model, the patched model, a probe without projection, and words
    alone. Writes report.md with its pictures, evaluate.json, answers.jsonl and card_section.md. An interrupted run goes
    on where it stopped when the same command is given again; accelerate launch spreads it over processes.
    """
    from sasa_export.cli import quiet

    quiet()
    from sasa_export.report import Console
    from sasa_export.research.evaluate import EvaluateOptions, evaluate

    evaluate(EvaluateOptions(**flags), Console())
