"""`sasa-export score`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sasa_export.report import Console, quiet


@click.command("score")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("data")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="JSONL file to write: id (or place in DATA), probability and verdict a line.",
)
@click.option(
    "--refuse-at-most",
    type=click.FloatRange(0, 1, max_open=True),
    help="Propose the lowest threshold that refuses at most this share of the prompts.",
)
@click.option("--write-threshold", is_flag=True, help="Write the proposed threshold into config.json.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Prompts at a time.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ..., or spread.")
def score_command(**values: Any) -> None:
    """Judge prompts that need no labels: P(unsafe) and verdict of each, and how they are spread.

    DIRECTORY is a patched one, of safetensors or of ONNX graphs. DATA is a JSONL file, {"image": path or null,
    "prompt": text} a line, or what --calibration takes.
    """
    quiet()
    from sasa_export.research.score.run import score

    click.echo("\n".join(score(**values, report=Console()).summary()))
