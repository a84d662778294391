"""All settings of a locate run, in one frozen value. The command's flags are made from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sasa_export.errors import LocateError
from sasa_export.flags import option
from sasa_export.options import DTYPES


@dataclass(frozen=True)
class LocateOptions:
    """What `sasa-export locate` does, and with what."""

    model: str = option("", "Alias, hub id (owner/name) or local directory.", required=True)
    out: Path = option(Path(), "Directory to write the report to.", required=True)
    force: bool = option(False, "Replace the report that is there, and discard other unfinished work.")
    calibration: tuple[str, ...] = option(
        (),
        "Labelled prompts: a JSONL file, or a data set of the field as name:PATH. May be given several times. "
        "Default: the built-in set.",
    )
    limit: int | None = option(None, "About how many pairs (groups) of prompts to use. Default: all.")
    blocks: str | None = option(None, "Blocks whose attention heads are ablated, such as 8-20. Default: all.")
    ablation_prompts: int = option(
        16,
        "Harmful and harmless prompts that heads are ablated on, so many of each; 0 leaves the ablation out. The "
        "cost is that of running them (blocks x heads / 2) times.",
    )
    pairs: str | None = option(
        None,
        "Pairs to sweep: 13:15, or ranges, 10-16:14-20, several behind commas. Default: all pairs of seven layers "
        "over the depth, each with one close behind it, and what the family's file says.",
    )
    write_family: Path | None = option(
        None,
        "Write the layers found into this family file; one that is not there begins as a copy of the model's own.",
    )
    epsilon: float = option(1e-6, "Least squared norm in the projection's denominator.")
    batch_size: int = option(16, "Prompts at a time.")
    device: str = option(
        "auto",
        "Where the model runs: auto, cpu, cuda, cuda:1 ..., or spread, over all devices, memory and disk, as auto "
        "does where one device has no room for the model.",
    )
    dtype: str = option("auto", "Type the model runs in.", choices=DTYPES)

    def check(self) -> None:
        """Raise LocateError where a setting leaves its range."""
        for name, least in (("limit", 1), ("batch_size", 1), ("ablation_prompts", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise LocateError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}.")
        if self.blocks is not None and not self.ablation_prompts:
            raise LocateError("--blocks says whose heads are ablated, and --ablation-prompts 0 leaves that out.")
