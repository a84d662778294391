"""Pictures of data sets."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from sasa_export.errors import DataError, reworded

# Formats that Pillow reads by itself; for some others it starts a program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def open_picture(held: Path | bytes, where: str) -> Image.Image:
    """The picture in RGB. DataError, which begins with `where`, if it is none, or in another than `FORMATS`."""
    file, name = (io.BytesIO(held), "in it") if isinstance(held, bytes) else (held, held)
    said = f"{where} names the image {name}, which cannot be read ({{reason}}). Give it as {', '.join(FORMATS)}."
    with reworded(DataError, said), Image.open(file, formats=FORMATS) as picture:
        return _in_rgb(picture)


def _in_rgb(picture: Image.Image) -> Image.Image:
    """Pillow cuts off what is above 255, which leaves pictures of 16 bits white: they are scaled down here."""
    if picture.mode == "F" or (picture.mode == "I" and picture.format == "TIFF"):
        raise ValueError(f"its values have no fixed range, being of mode {picture.mode}")
    if picture.mode.startswith("I"):
        values = np.clip(np.asarray(picture, dtype=np.int64), 0, 65535)  # (height, width)
        picture = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return picture.convert("RGB")
