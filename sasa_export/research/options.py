"""The options of `sasa-export locate` and `evaluate`, as frozen dataclasses that also define their flags."""

from dataclasses import dataclass
from pathlib import Path

import click

from sasa_export.flags import OptionSet, option
from sasa_export.layers import LIMIT
from sasa_export.options import COUNT, DEVICE, DTYPES, LANE_TOKENS, ONNX_FILE, PATH, REACH, REVISION

# Help texts that both share.
FORCE = "Replace the report that is there, and discard other unfinished work."
PROMPTS = "Labelled prompts: a JSONL file, or a data set of the field as name:PATH. May be given several times."


@dataclass(frozen=True)
class LocateOptions(OptionSet):
    """The options of `sasa-export locate`."""

    model: str = option("", "Alias, hub id (owner/name) or local directory.", required=True)
    out: Path = option(Path(), "Directory to write the report to.", PATH, required=True)
    force: bool = option(False, FORCE)
    revision: str | None = option(None, REVISION)
    onnx_file: tuple[str, ...] = option((), ONNX_FILE, multiple=True)
    calibration: tuple[str, ...] = option((), f"{PROMPTS} Default: the built-in set.", multiple=True)
    limit: int = option(LIMIT, "About how many groups of prompts to use, such as pairs.", COUNT)
    pairs: str | None = option(
        None,
        "Pairs to sweep: 13:15, or ranges, 10-16:14-20, several behind commas. Default: all pairs of seven layers "
        "over the depth, each with one close behind it, and what the family's file says.",
    )
    lane_tokens: int = option(REACH, LANE_TOKENS, COUNT)
    batch_size: int = option(16, "Prompts at a time.", COUNT)
    device: str = option("auto", f"Where the model runs: {DEVICE}")
    dtype: str = option("auto", "Type the model runs in.", click.Choice(DTYPES))


@dataclass(frozen=True)
class EvaluateOptions(OptionSet):
    """The options of `sasa-export evaluate`."""

    model: Path = option(Path(), "The patched directory, of safetensors or of ONNX graphs.", PATH, required=True)
    out: Path = option(Path(), "Directory to write the report to.", PATH, required=True)
    force: bool = option(False, FORCE)
    baseline: str | None = option(None, "The model it was made from. Default: what its sasa-export.json names.")
    against: Path | None = option(
        None, "Another patched directory, such as one fine-tuned or quantized since: which verdicts changed.", PATH
    )
    data: tuple[str, ...] = option((), f"{PROMPTS} Default: the built-in evaluation set.", multiple=True)
    calibration: tuple[str, ...] = option(
        (),
        "What the arms without projection and of words alone are fitted on. Default: what the patched model was "
        "calibrated on.",
        multiple=True,
    )
    limit: int | None = option(None, "About how many prompts to use. Default: all.", click.IntRange(2))
    max_new_tokens: int = option(32, "Longest answer.", COUNT)
    batch_size: int = option(16, "Prompts at a time.", COUNT)
    device: str = option("auto", f"Where the models run: {DEVICE}")
    dtype: str = option("auto", "Type the models run in.", click.Choice(DTYPES))
