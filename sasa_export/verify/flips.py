"""How many verdicts a type of the graphs turns over: prompts of the calibration set, judged again by the graphs."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sasa_export.probe import Calibration
from sasa_export.prompts.prompt import Prompt
from sasa_export.verify.check import Check

PROMPTS = "prompts.json"
SEED = 0  # of the sample


@dataclass(frozen=True)
class Reference:
    """Prompts with the P(unsafe) that the calibration gave them, and from how many they were taken.

    `dtype` is what the calibration ran in; `most` is the largest share of them that may flip.
    """

    prompts: tuple[Prompt, ...]
    scores: tuple[float, ...]
    whole: int
    dtype: str
    most: float


@dataclass(frozen=True)
class Flips:
    """`allowed` prompts were refused by the calibration and are answered by the graphs, `refused` the other way round.

    `prompts` of the `whole` calibration set were judged, `seed` drew them. `share` is that of both kinds.
    """

    prompts: int
    whole: int
    allowed: int
    refused: int
    share: float
    most: float
    dtype: str
    calibration_dtype: str
    seed: int = SEED

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def reference(calibration: Calibration, *, count: int, most: float, dtype: str) -> Reference:
    """All prompts of a calibration where it has at most `count`, else as many of each label and channel as can be."""
    rows = _sample(calibration.prompts, count)
    return Reference(
        tuple(calibration.prompts[row] for row in rows),
        tuple(float(calibration.final[row]) for row in rows),
        len(calibration.prompts),
        dtype,
        most,
    )


def _sample(prompts: Sequence[Prompt], count: int) -> list[int]:
    """Row numbers, in order. Kinds take turns, so that a small one comes in whole."""
    if len(prompts) <= count:
        return list(range(len(prompts)))
    kinds: dict[tuple[int, str], list[int]] = {}
    for row, prompt in enumerate(prompts):
        kinds.setdefault((prompt.label, prompt.channel), []).append(row)
    draw = random.Random(SEED)
    for rows in kinds.values():
        draw.shuffle(rows)
    turns = sorted((turn, kind, row) for kind, rows in kinds.items() for turn, row in enumerate(rows))
    return sorted(row for _, _, row in turns[:count])


def write_prompts(wanted: Reference, folder: Path) -> None:
    """Write the prompts for a process that knows nothing of this project, their pictures beside them."""
    entries = []
    for number, prompt in enumerate(wanted.prompts):
        image = None
        if prompt.image is not None:
            image = f"{number:06}.png"
            prompt.image().save(folder / image)
        entries.append({"prompt": prompt.prompt, "image": image})
    (folder / PROMPTS).write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")


def count_flips(wanted: Reference, scores: Sequence[float], threshold: float, dtype: str) -> Flips:
    """Compare the graphs' P(unsafe) with the calibration's; `dtype` is that of the graphs. NaN is refused."""
    pairs = [
        (not before < threshold, not after < threshold) for before, after in zip(wanted.scores, scores, strict=True)
    ]
    allowed = sum(before and not after for before, after in pairs)
    refused = sum(after and not before for before, after in pairs)
    share = (allowed + refused) / len(pairs)
    return Flips(len(pairs), wanted.whole, allowed, refused, share, wanted.most, dtype, wanted.dtype)


def check_flips(flips: Flips, wanted: Reference, scores: Sequence[float], threshold: float, tolerance: float) -> Check:
    """Whether few enough verdicts flip; where all is float32, none may that is no matter of rounding.

    `tolerance` is how near to the threshold a P(unsafe) must be for its verdict to be one.
    """
    clear = sum(
        abs(before - threshold) > tolerance and (before < threshold) != (after < threshold)
        for before, after in zip(wanted.scores, scores, strict=True)
    )
    exact = flips.dtype == flips.calibration_dtype == "float32"
    detail = said(flips)
    if exact:
        detail += f", {clear} of them farther than {tolerance:g} from the threshold (none may be)"
    passed = flips.share <= flips.most and not (exact and clear)
    return Check("verdicts hold over the calibration prompts", passed, detail)


def said(flips: Flips) -> str:
    """The share of flips in words."""
    of = f"all {flips.whole}" if flips.prompts == flips.whole else f"{flips.prompts} drawn from {flips.whole}"
    return (
        f"{flips.share:.1%} flipped of {of} ({flips.allowed} now answered, {flips.refused} now refused), at most "
        f"{flips.most:.1%} may ({flips.dtype} graphs, {flips.calibration_dtype} calibration)"
    )
