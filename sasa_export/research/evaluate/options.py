"""All settings of an evaluation, in one frozen value. The flags of the command line are made from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sasa_export.errors import EvaluateError
from sasa_export.flags import option
from sasa_export.options import DTYPES

LEAST = {"limit": 2, "max_new_tokens": 1, "batch_size": 1, "timing": 0}


@dataclass(frozen=True)
class EvaluateOptions:
    """What `sasa-export evaluate` does, and with what."""

    model: Path = option(Path(), "The patched directory, of safetensors or of ONNX graphs.", required=True)
    out: Path = option(Path(), "Directory to write the report to.", required=True)
    force: bool = option(False, "Replace the report that is there, and discard other unfinished work.")
    baseline: str | None = option(None, "The model it was made from. Default: what its sasa-export.json names.")
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
    judge: str | None = option(
        None,
        "A further judge, module:function, called with the request and the answer: True where the answer complies. "
        "It runs code of yours.",
    )
    limit: int | None = option(None, "About how many prompts to use. Default: all.")
    max_new_tokens: int = option(32, "Longest answer.")
    depth_curve: bool = option(False, "Also probe at every block of the second lane.")
    timing: int = option(12, "Prompts to time both models on; 0 leaves it out.")
    batch_size: int = option(16, "Prompts at a time.")
    device: str = option(
        "auto",
        "Where the models run: auto, cpu, cuda, cuda:1 ..., or spread, over all devices, memory and disk, as auto does "
        "where one device has no room for the model.",
    )
    dtype: str = option("auto", "Type the models run in.", choices=DTYPES)

    def check(self) -> None:
        """Raise EvaluateError where a setting leaves its range."""
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise EvaluateError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}.")
        if self.dtype not in DTYPES:
            raise EvaluateError(f"--dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}.")
