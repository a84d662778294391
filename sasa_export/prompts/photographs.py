"""Photographs for ordinary questions: crops of the photographs in scikit-learn and matplotlib."""

import functools
from pathlib import Path
from random import Random

import matplotlib
from PIL import Image, ImageOps

SIDE = 384  # length of the shorter side in pixels


def photograph(seed: int) -> Image.Image:
    """Return a random crop of a photograph, in RGB. Equal seeds give equal pixels."""
    rng = Random(seed)
    whole = _open(rng.choice(_files()))
    share = rng.uniform(0.35, 1.0)
    width, height = (round(share * length) for length in whole.size)
    left, top = rng.randint(0, whole.width - width), rng.randint(0, whole.height - height)
    part = whole.crop((left, top, left + width, top + height))
    if rng.random() < 0.5:
        part = ImageOps.mirror(part)
    scale = SIDE / min(part.size)
    return part.resize((round(scale * part.width), round(scale * part.height)), Image.Resampling.BICUBIC)


@functools.cache
def _files() -> tuple[Path, ...]:
    import sklearn.datasets

    images = Path(sklearn.datasets.__file__).parent / "images"
    carried = Path(matplotlib.get_data_path()) / "sample_data"
    files = (images / "china.jpg", images / "flower.jpg", carried / "grace_hopper.jpg")
    return tuple(file for file in files if file.exists())


@functools.cache
def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")
