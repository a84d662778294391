"""The command that a report was made with, for whoever wants to make it again."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

LEFT_OUT = ("model", "out", "force", "device")  # said first, or no part of the result


def command_line(name: str, options: Any) -> str:
    """`sasa-export NAME` with the options (a dataclass) that differ from the defaults.

    The model and files go by their last names, and the output is `report`: where they lay is nobody's business. Data
    is named as it was given.
    """
    model = str(options.model)
    parts = ["sasa-export", name, "--model", Path(model).resolve().name if Path(model).exists() else model]
    for entry in fields(options):
        value = getattr(options, entry.name)
        if entry.name in LEFT_OUT or value == entry.default:
            continue
        flag = "--" + entry.name.replace("_", "-")
        if value is True:
            parts.append(flag)
        else:
            for item in value if isinstance(value, tuple) else (value,):
                parts += [flag, item.name if isinstance(item, Path) else str(item)]
    return shlex.join([*parts, "--out", "report"])
