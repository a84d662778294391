"""sasa-export.json: all options, versions, and the SHA-256 of every file, to detect changes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sasa_export.errors import EmitError

MANIFEST = "sasa-export.json"
PACKAGES = ("torch", "transformers", "safetensors", "scikit-learn", "numpy", "pillow")


def write_manifest(
    directory: Path, known: Mapping[str, str | None], *, packages: Sequence[str] = (), **entries: Any
) -> None:
    """Write the manifest of every file in `directory`.

    Args:
        known: digests that are already computed, by file name.
        packages: further packages whose versions are recorded.
        entries: further entries of the manifest, besides versions and digests.
    """
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix()
        if name != MANIFEST:
            files[name] = known.get(name) or digest(path)
    data = {
        "tool": f"sasa-export {version('sasa-export')}",
        **entries,
        "versions": {name: version(name) for name in (*PACKAGES, *packages)},
        "files": files,
    }
    (directory / MANIFEST).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_ours(out: Path) -> None:
    """Raise EmitError where `out` holds a file that no manifest in it lists. --force must not delete such files."""
    ours: set[str] = set()
    for path in out.rglob(MANIFEST):
        with suppress(OSError, ValueError, KeyError, TypeError):  # a damaged manifest lists nothing
            folder = path.parent.relative_to(out)
            ours |= {(folder / name).as_posix() for name in (MANIFEST, *json.loads(path.read_text("utf-8"))["files"])}
    others = sorted({path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()} - ours)
    if others:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise EmitError(
            f"{out} holds {others[0]}{more}, which sasa-export did not write, so --force does not replace it. Give "
            "another --out, or move those files away."
        )


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
