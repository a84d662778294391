"""Pictures of a data set: found inside its directory, decodable, told apart by their bytes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sasa_export.errors import DataError


class Pictures:
    """Finds pictures in the first of `folders` that has them, and checks each file once."""

    def __init__(self, *folders: Path) -> None:
        self.folders = folders
        self.checked: set[Path] = set()

    def find(self, relative: str, where: str) -> Path:
        """The file of a picture. DataError, which begins with `where`, if it is missing, outside or no picture."""
        outside = PurePosixPath(relative).is_absolute() or PureWindowsPath(relative).drive
        # A link may lead elsewhere, as in a download cache; a name may not.
        if outside or ".." in PurePosixPath(relative).parts or ".." in PureWindowsPath(relative).parts:
            raise DataError(f"{where} names the picture {relative[:200]!r}, which leaves the data set's directory.")
        candidates = [folder / relative for folder in self.folders]
        path = next((path for path in candidates if os.path.isfile(path)), None)
        if path is None:
            raise DataError(f"{where} names the picture {str(candidates[0])[:300]}, which does not exist.")
        if path not in self.checked:
            _check(path, where)
            self.checked.add(path)
        return path


def open_picture(path: Path, where: str) -> Any:
    """The picture in RGB."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        raise _unreadable(path, where, error) from None


def digest(record: Any) -> str | None:
    """What a record's picture is known by: the SHA-256 of its file's bytes, or of its pixels where it is drawn.

    None for a record without a picture.
    """
    if record.picture is not None:
        try:
            with record.picture.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"the picture {record.picture} cannot be read ({error.strerror}).") from None
    if record.image is None:
        return None
    drawn = record.image()
    return hashlib.sha256(f"{drawn.mode} {drawn.size} ".encode() + drawn.tobytes()).hexdigest()


def _check(path: Path, where: str) -> None:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            if picture.format == "PNG":
                picture.verify()  # its checksums say without decoding whether it is whole
            else:
                picture.draft("RGB", (1, 1))  # JPEG: an eighth of the size, still all of the file
                picture.load()
    except Exception as error:
        raise _unreadable(path, where, error) from None


def _unreadable(path: Path, where: str, error: Exception) -> DataError:
    why = " ".join(str(error).split())[:200]
    return DataError(f"{where} names the picture {path}, which cannot be read ({why}).")
