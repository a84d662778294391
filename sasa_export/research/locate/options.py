"""All settings of a locate run, in one frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sasa_export.errors import LocateError
from sasa_export.options import DTYPES, Options


@dataclass(frozen=True)
class LocateOptions:
    """What `sasa-export locate` does, and with what.

    Attributes:
        model: alias, hub id or directory.
        out: the directory that the report is written to.
        calibration: specs of labelled prompts, as `Options.calibration`; () is the built-in set.
        limit: about how many groups (pairs) of prompts are used; None uses all.
        blocks: whose heads are ablated, such as "8-20"; None takes all.
        ablation_prompts: harmful and harmless prompts that heads are ablated on, of each; 0 leaves ablation out.
        pairs: which (s, f) pairs are swept, such as "13:15" or "10-16:14-20"; None takes a grid.
        write_family: a family file that the layers found are written into.
    """

    model: str
    out: Path
    calibration: tuple[str, ...] = ()
    limit: int | None = None
    blocks: str | None = None
    ablation_prompts: int = 16
    pairs: str | None = None
    write_family: Path | None = None
    epsilon: float = 1e-6
    batch_size: int = 16
    device: str = "auto"
    dtype: str = "auto"
    force: bool = False

    def check(self) -> None:
        """Raise LocateError where a setting leaves its range."""
        for name, least in (("limit", 1), ("batch_size", 1), ("ablation_prompts", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise LocateError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}.")
        if self.blocks is not None and not self.ablation_prompts:
            raise LocateError("--blocks says whose heads are ablated, and --ablation-prompts 0 leaves that out.")
        if self.dtype not in DTYPES:
            raise LocateError(f"--dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}.")

    def running(self, device: str) -> Options:
        """The options of a patch that say how a model runs, for what both share."""
        return Options(device=device, dtype=self.dtype)
