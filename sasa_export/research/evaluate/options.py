"""What `sasa-export evaluate` can be told, in one frozen value, from which its flags are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sasa_export.flags import OptionSet, option
from sasa_export.options import AT_LEAST_ONE, DEVICE, DTYPES


@dataclass(frozen=True)
class EvaluateOptions(OptionSet):
    """What `sasa-export evaluate` does, and with what."""

    model: Path = option(Path(), "The patched directory, of safetensors or of ONNX graphs.", required=True)
    out: Path = option(Path(), "Directory to write the report to.", required=True)
    force: bool = option(False, "Replace the report that is there, and discard other unfinished work.")
    baseline: str | None = option(None, "The model it was made from. Default: what its sasa-export.json names.")
    against: Path | None = option(
        None, "Another patched directory, such as one fine-tuned or quantized since: which verdicts changed."
    )
    data: tuple[str, ...] = option(
        (),
        "Labelled prompts: a JSONL file, or a data set of the field as name:PATH. May be given several times. "
        "Default: the built-in evaluation set.",
    )
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
