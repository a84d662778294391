"""`sasa-export locate`: flags and help."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click


@click.command("locate")
@click.option("--model", required=True, help="Alias, hub id (owner/name) or local directory.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to write the report to.")
@click.option("--force", is_flag=True, help="Replace the report that is there, and discard other unfinished work.")
@click.option(
    "--calibration",
    multiple=True,
    help="Labelled prompts: a JSONL file, or a data set of the field as name:PATH. May be given several times. "
    "Default: the built-in set.",
)
@click.option("--limit", type=click.INT, help="About how many pairs (groups) of prompts to use. Default: all.")
@click.option("--blocks", help="Blocks whose attention heads are ablated, such as 8-20. Default: all.")
@click.option(
    "--ablation-prompts",
    type=click.INT,
    default=16,
    show_default=True,
    help="Harmful and harmless prompts that heads are ablated on, so many of each; 0 leaves the ablation out. The "
    "cost is that of running them (blocks x heads / 2) times.",
)
@click.option(
    "--pairs",
    help="Pairs to sweep: 13:15, or ranges, 10-16:14-20, several behind commas. Default: all pairs of seven layers "
    "over the depth, each with one close behind it, and what the family's file says.",
)
@click.option(
    "--write-family",
    type=click.Path(path_type=Path),
    help="Write the layers found into this family file; one that is not there begins as a copy of the model's own.",
)
@click.option("--batch-size", type=click.INT, default=16, show_default=True, help="Prompts at a time.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Where the model runs: auto, cpu, cuda, cuda:1 ..., or spread, over all devices, memory and disk, as auto "
    "does where one device has no room for the model.",
)
@click.option(
    "--dtype",
    type=click.Choice(("auto", "float32", "bfloat16", "float16")),
    default="auto",
    show_default=True,
    help="Type the model runs in.",
)
def locate_command(**flags: Any) -> None:
    """Find where a model perceives danger, understands and speaks, and propose its layers.

    Writes report.html, which opens without a network, with its pictures, report.md and locate.json. An interrupted run
    goes on where it stopped when the same command is given again.
    """
    from sasa_export.cli import quiet

    quiet()
    from sasa_export.report import Console
    from sasa_export.research.locate import LocateOptions, locate

    known = {entry.name for entry in fields(LocateOptions)}
    locate(LocateOptions(**{name: value for name, value in flags.items() if name in known}), Console())
