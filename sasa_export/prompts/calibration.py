"""What --calibration names: a JSONL file of ours, or one or more data sets."""

from __future__ import annotations

from collections.abc import Sequence

from sasa_export.errors import DataError
from sasa_export.prompts import jsonl
from sasa_export.prompts.prompt import LEAST, Prompt, from_jsonl
from sasa_export.prompts.registry import load_all, named

FLAG = "--calibration"
KINDS = {  # what to add where one label is missing
    1: ("harmful", "figstep:DIR or mm-safetybench:DIR"),
    0: ("harmless", "xstest:FILE,subset=safe (text) or vlguard:DIR,subset=safe_safes (pictures)"),
}


def calibration_prompts(specs: Sequence[str]) -> list[Prompt]:
    """The prompts of all specs, with harmful and harmless ones among them.

    A single JSONL file keeps its own groups; otherwise records that share a picture or a question are one group.
    Raises CalibrationError or DataError, both in one line.
    """
    if len(specs) == 1:
        spec, loader = named(specs[0])
        if loader is jsonl.LOADER:
            spec.chosen(loader)  # it has no options, and says so
            return from_jsonl(spec.path)
    prompts = load_all(specs, FLAG)
    for label, (what, example) in KINDS.items():
        if sum(prompt.label == label for prompt in prompts) < LEAST:
            given = f"{specs[0]} has" if len(specs) == 1 else f"{' and '.join(specs)} have"
            raise DataError(
                f"{given} fewer than {LEAST} {what} prompts (label {label}), and a probe needs both classes. Add them "
                f"with another {FLAG}, for example {FLAG} {example}."
            )
    return prompts


def lopsided(prompts: Sequence[Prompt]) -> str | None:
    """A warning where the label can be told from whether there is a picture: the probe might learn just that."""
    labels = {channel: {p.label for p in prompts if p.channel == channel} for channel in ("text", "picture")}
    if all(len(found) == 1 for found in labels.values()) and labels["text"] != labels["picture"]:
        pictured = "harmful" if labels["picture"] == {1} else "harmless"
        other = "harmless" if pictured == "harmful" else "harmful"
        return (
            f"All prompts with a picture are {pictured} and all without one are {other}, so the probe may learn to see "
            f"whether there is a picture instead of what is asked. Add {other} prompts with pictures, for example from "
            "VLGuard."
        )
    return None
