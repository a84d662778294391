"""Checks of a source directory's content: its files lie inside it, and it needs no code of its own."""

import json
import os
from pathlib import Path
from typing import Any

from sasa_export.errors import OpenError, reworded

NAME_CODE = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
ADAPTER = "adapter_config.json"


def check_contents(directory: Path) -> None:
    """Raise OpenError where a directory has links out of it, names custom code (`auto_map`), or holds an adapter."""
    left = outside(directory)
    if left:
        raise OpenError(f"{left[0]} in {directory} is a link that leads out of it. Put the file itself there.")
    if (directory / ADAPTER).exists():
        raise OpenError(
            f"{directory} holds an adapter ({ADAPTER}), which loading would apply to weights that are written without "
            "it. Merge it into the model first (peft: merge_and_unload, then save_pretrained)."
        )
    for name in NAME_CODE:
        if read_object(directory / name).get("auto_map"):
            raise OpenError(
                f"{directory / name} names code of the model's own (auto_map). sasa-export rewrites transformers' own "
                "classes and runs no code of a model. If the weights are those of the stock class, remove auto_map."
            )


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, empty where the file is missing. Raise OpenError where it is damaged."""
    if not path.exists():
        return {}
    with reworded(OpenError, f"{path} is not valid JSON ({{reason}}). Restore the file from its source."):
        data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise OpenError(f"{path} does not hold a JSON object. Restore the file from its source.")
    return data


def outside(directory: Path) -> list[str]:
    """Return the names of the links that lead out of a directory.

    A snapshot in the hub's cache may link to the blobs of its own repository.
    """
    real = directory.resolve()
    root = real.parents[1] if real.parent.name == "snapshots" else real
    return [path.name for path in sorted(real.iterdir()) if root not in Path(os.path.realpath(path)).parents]
