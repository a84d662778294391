"""Pictures of data sets."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from sasa_export.errors import DataError

# Formats that Pillow reads by itself; for some others it starts a program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def pictured(where: str, *candidates: Path) -> dict[str, Any]:
    """The fields of a Prompt whose picture is the first of the files that exists.

    DataError, which begins with `where` (the record), if none does.
    """
    path = next((path for path in candidates if os.path.isfile(path)), None)
    if path is None:
        raise DataError(f"{where} names the image {str(candidates[0])[:300]}, which does not exist.")
    return {"channel": "picture", "picture": path, "image": partial(open_picture, path, where)}


def open_picture(path: Path, where: str) -> Image.Image:
    """The picture in RGB. DataError, which begins with `where`, if it is none, or in another than `FORMATS`."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            return picture.convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        why = " ".join(str(error).split())[:200]
        raise DataError(
            f"{where} names the image {path}, which cannot be read ({why}). Give it as {', '.join(FORMATS)}."
        ) from None
