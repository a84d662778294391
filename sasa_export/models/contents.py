"""What a model directory may hold: files of its own, plain weights, and no code that would have to be run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sasa_export.errors import OpenError

CODE = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
ADAPTER = "adapter_config.json"


def check_contents(directory: Path, config: dict[str, Any]) -> None:
    """Raise OpenError where a source directory would lead outside itself, or is not what its weights alone say."""
    left = outside(directory)
    if left:
        raise OpenError(
            f"{left[0]} in {directory} is no file of that directory, but leads out of it (or is no file at all). "
            "Put the file itself there."
        )
    if (directory / ADAPTER).exists():
        raise OpenError(
            f"{directory} holds an adapter ({ADAPTER}), which loading would apply to weights that are written without "
            "it. Merge it into the model first (peft: merge_and_unload, then save_pretrained)."
        )
    check_code(directory, config)
    check_generation(directory)


def check_code(directory: Path, config: dict[str, Any]) -> None:
    """Raise OpenError where a source names Python code of its own (`auto_map`): none is ever run."""
    for name in CODE:
        data = config if name == CODE[0] else read_object(directory / name)
        if data.get("auto_map"):
            raise OpenError(
                f"{directory / name} names code of the model's own (auto_map). sasa-export rewrites transformers' own "
                "classes and runs no code of a model. If the weights are those of the stock class, remove auto_map."
            )


def check_generation(directory: Path) -> None:
    """Raise OpenError where generation_config.json does not say how an answer ends, in numbers."""
    path = directory / "generation_config.json"
    ends = read_object(path).get("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(token) is int and token >= 0 for token in listed):
        raise OpenError(f"{path} has the eos_token_id {ends!r}, which is no token. Restore the file from its source.")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty where there is no file. OpenError where it is damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise OpenError(f"{path} is not valid JSON ({error}). Restore the file from its source.") from None
    if not isinstance(data, dict):
        raise OpenError(f"{path} does not hold a JSON object. Restore the file from its source.")
    return data


def outside(directory: Path) -> list[str]:
    """Names in a directory behind which there is no file or directory of its own: links out of it, pipes, devices.

    The hub's cache keeps a snapshot's files as links to the blobs of the same repository, which are its own.
    """
    real = directory.resolve()
    roots = [real]
    if real.parent.name == "snapshots" and real.parents[1].name.startswith("models--"):
        roots.append(real.parents[1])
    left = []
    for path in sorted(real.iterdir()):
        try:
            target = path.resolve()
            own = any(root in target.parents for root in roots) and (path.is_file() or path.is_dir())
        except (OSError, RuntimeError):  # a loop of links
            own = False
        if not own:
            left.append(path.name)
    return left
