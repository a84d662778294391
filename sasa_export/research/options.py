"""What `sasa-export locate` and `evaluate` can be told, in frozen values, from which their flags are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sasa_export.flags import OptionSet, option
from sasa_export.layers import LIMIT
from sasa_export.options import AT_LEAST_ONE, DEVICE, DTYPES, ONNX_FILE, REVISION

# Help that both have in common.
FORCE = "Replace the report that is there, and discard other unfinished work."
PROMPTS = "Labelled prompts: a JSONL file, or a data set of the field as name:PATH. May be given several times."


@dataclass(frozen=True)
class LocateOptions(OptionSet):
    """What `sasa-export locate` does, and with what."""

    model: str = option("", "Alias, hub id (owner/name) or local directory.", required=True)
    out: Path = option(Path(), "Directory to write the report to.", required=True)
    force: bool = option(False, FORCE)
    revision: str | None = option(None, REVISION)
    onnx_file: tuple[str, ...] = option((), ONNX_FILE)
    calibration: tuple[str, ...] = option((), f"{PROMPTS} Default: the built-in set.")
    limit: int = option(LIMIT, "About how many groups of prompts to use, such as pairs.", valid=AT_LEAST_ONE)
    pairs: str | None = option(
        None,
        "Pairs to sweep: 13:15, or ranges, 10-16:14-20, several behind commas. Default: all pairs of seven layers "
        "over the depth, each with one close behind it, and what the family's file says.",
    )
    batch_size: int = option(16, "Prompts at a time.", valid=AT_LEAST_ONE)
    device: str = option("auto", f"Where the model runs: {DEVICE}")
    dtype: str = option("auto", "Type the model runs in.", choices=DTYPES)


@dataclass(frozen=True)
class EvaluateOptions(OptionSet):
    """What `sasa-export evaluate` does, and with what."""

    model: Path = option(Path(), "The patched directory, of safetensors or of ONNX graphs.", required=True)
    out: Path = option(Path(), "Directory to write the report to.", required=True)
    force: bool = option(False, FORCE)
    baseline: str | None = option(None, "The model it was made from. Default: what its sasa-export.json names.")
    against: Path | None = option(
        None, "Another patched directory, such as one fine-tuned or quantized since: which verdicts changed."
    )
    data: tuple[str, ...] = option((), f"{PROMPTS} Default: the built-in evaluation set.")
    calibration: tuple[str, ...] = option(
        (),
        "What the arms without projection and of words alone are fitted on. Default: what the patched model was "
        "calibrated on.",
    )
    limit: int | None = option(
        None, "About how many prompts to use. Default: all.", valid=("at least 2", lambda value: value >= 2)
    )
    max_new_tokens: int = option(32, "Longest answer.", valid=AT_LEAST_ONE)
    batch_size: int = option(16, "Prompts at a time.", valid=AT_LEAST_ONE)
    device: str = option("auto", f"Where the models run: {DEVICE}")
    dtype: str = option("auto", "Type the models run in.", choices=DTYPES)
