"""What `sasa-export locate` can be told, in one frozen value, from which its flags are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sasa_export.errors import LocateError
from sasa_export.flags import OptionSet, check_values, option
from sasa_export.layers import LIMIT
from sasa_export.options import AT_LEAST_ONE, DEVICE, DTYPES, ONNX_FILE, REVISION


@dataclass(frozen=True)
class LocateOptions(OptionSet):
    """What `sasa-export locate` does, and with what."""

    model: str = option("", "Alias, hub id (owner/name) or local directory.", required=True)
    out: Path = option(Path(), "Directory to write the report to.", required=True)
    force: bool = option(False, "Replace the report that is there, and discard other unfinished work.")
    revision: str | None = option(None, REVISION)
    onnx_file: tuple[str, ...] = option((), ONNX_FILE)
    calibration: tuple[str, ...] = option(
        (),
        "Labelled prompts: a JSONL file, or a data set of the field as name:PATH. May be given several times. "
        "Default: the built-in set.",
    )
    limit: int = option(LIMIT, "About how many groups of prompts to use, such as pairs.", valid=AT_LEAST_ONE)
    blocks: str | None = option(None, "Blocks whose attention heads are ablated, such as 8-20. Default: all.")
    ablation_prompts: int = option(
        16,
        "Harmful and harmless prompts that heads are ablated on, so many of each; 0 leaves the ablation out. The "
        "cost is that of running them (blocks x heads / 2) times.",
        valid=("at least 0", lambda value: value >= 0),
    )
    pairs: str | None = option(
        None,
        "Pairs to sweep: 13:15, or ranges, 10-16:14-20, several behind commas. Default: all pairs of seven layers "
        "over the depth, each with one close behind it, and what the family's file says.",
    )
    batch_size: int = option(16, "Prompts at a time.", valid=AT_LEAST_ONE)
    device: str = option("auto", f"Where the model runs: {DEVICE}")
    dtype: str = option("auto", "Type the model runs in.", choices=DTYPES)

    def check(self) -> None:
        """Raise SasaExportError where options contradict each other or leave their range."""
        check_values(self)
        if self.blocks is not None and not self.ablation_prompts:
            raise LocateError("--blocks says whose heads are ablated, and --ablation-prompts 0 leaves that out.")
