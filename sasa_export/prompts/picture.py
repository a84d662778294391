"""Pictures of data sets."""

from __future__ import annotations

import io
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sasa_export.errors import DataError

# Formats that Pillow reads by itself; for some others it starts a program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MARK = "<image>"  # where LLaVA's own files have the picture in the text


def pictured(where: str, *candidates: Path | bytes) -> dict[str, Any]:
    """The fields of a Prompt whose picture is the first of the files that exists, or what is held as bytes.

    DataError, which begins with `where` (the record), if there is none.
    """
    held = next((it for it in candidates if isinstance(it, bytes) or os.path.isfile(it)), None)
    if held is None:
        raise DataError(f"{where} names the image {str(candidates[0])[:300]}, which does not exist.")
    file = None if isinstance(held, bytes) else held
    if file is None:
        open_picture(held, where)  # a broken one is an error now; `load` tries those in files, each once
    return {"channel": "picture", "picture": file, "image": partial(open_picture, held, where)}


def open_picture(held: Path | bytes, where: str) -> Image.Image:
    """The picture in RGB. DataError, which begins with `where`, if it is none, or in another than `FORMATS`."""
    try:
        with Image.open(io.BytesIO(held) if isinstance(held, bytes) else held, formats=FORMATS) as picture:
            return _in_rgb(picture)
    except Exception as error:  # Pillow's decoders raise whatever broken bytes lead them to
        why, name = " ".join(str(error).split())[:200], "in it" if isinstance(held, bytes) else held
        raise DataError(
            f"{where} names the image {name}, which cannot be read ({why}). Give it as {', '.join(FORMATS)}."
        ) from None


def unmarked(text: str, has_picture: bool, where: str) -> str:
    """The text without the mark of its picture's place. DataError where it marks more pictures than there are."""
    marks = text.count(MARK)
    if marks > has_picture:
        raise DataError(
            f"{where} has {MARK} {marks} times in its prompt and {'one picture' if has_picture else 'no picture'}: "
            f"take {MARK} out, or name the picture as its image."
        )
    return text.replace(MARK, "").strip() if marks else text


def _in_rgb(picture: Image.Image) -> Image.Image:
    """Pillow cuts off what is above 255, which leaves pictures of 16 bits white: they are scaled down here."""
    if picture.mode == "F" or (picture.mode == "I" and picture.format == "TIFF"):
        raise ValueError(f"its values have no fixed range, being of mode {picture.mode}")
    if picture.mode.startswith("I"):
        values = np.clip(np.asarray(picture, dtype=np.int64), 0, 65535)  # (height, width)
        picture = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return picture.convert("RGB")
