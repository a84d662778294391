"""All settings of an evaluation, in one frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasa_export.errors import EvaluateError
from sasa_export.options import DTYPES, Options


@dataclass(frozen=True)
class EvaluateOptions:
    """What `sasa-export evaluate` does, and with what.

    Attributes:
        model: the patched directory, of safetensors or of ONNX graphs.
        out: the directory that the report is written to.
        baseline: the model that it was made from; None is what its sasa-export.json names.
        data: specs of labelled prompts; () is the built-in evaluation set.
        calibration: what the arms that are fitted here are fitted on; () is what the model was calibrated on.
        judge: `module:function` of a further judge of attacks.
        limit: about how many prompts are used; None uses all.
        max_new_tokens: of each answer.
        timing: prompts that both models are timed on; 0 leaves it out.
        depth_curve: also probe at every block of the second lane.
        variants: also measure what else a probe could read of the same prompts.
    """

    model: Path
    out: Path
    baseline: str | None = None
    data: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    judge: str | None = None
    limit: int | None = None
    max_new_tokens: int = 32
    batch_size: int = 16
    timing: int = 12
    depth_curve: bool = False
    variants: bool = False
    device: str = "auto"
    dtype: str = "auto"
    force: bool = False

    def check(self) -> None:
        """Raise EvaluateError where a setting leaves its range."""
        for name, least in (("limit", 2), ("max_new_tokens", 1), ("batch_size", 1), ("timing", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise EvaluateError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}.")
        if self.dtype not in DTYPES:
            raise EvaluateError(f"--dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}.")

    def running(self, device: str) -> Options:
        """The options of a patch that say how a model runs, for what both share."""
        return Options(device=device, dtype=self.dtype)

    def to_json(self) -> dict[str, Any]:
        """What shapes the result, as it was given."""
        return {
            "data": list(self.data) or None,
            "calibration": list(self.calibration) or None,
            "judge": self.judge,
            "limit": self.limit,
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
        }
