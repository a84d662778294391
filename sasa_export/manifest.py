"""sasa-export.json: all options, versions, and the SHA-256 of every file, so that a change is seen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MANIFEST = "sasa-export.json"
PACKAGES = ("torch", "transformers", "safetensors", "scikit-learn", "numpy", "pillow")


def write_manifest(directory: Path, known: dict[str, str], *, packages: Sequence[str] = (), **entries: Any) -> None:
    """Write the manifest over every file in `directory`.

    Args:
        known: digests that need not be computed again, by file name.
        packages: further ones whose versions shape the result.
        entries: what the manifest holds besides versions and digests.
    """
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name != MANIFEST:
            files[name] = known.get(name) or digest(path)
    data = {
        "tool": f"sasa-export {_version('sasa-export')}",
        **entries,
        "versions": {name: _version(name) for name in (*PACKAGES, *packages)},
        "files": files,
    }
    (directory / MANIFEST).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def digest(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its source, or installed under another name
        return "unknown"
