"""Place a request in harmless long text: behind, in front of or inside it, under a long system prompt, or after eight
turns. long_texts.toml holds the texts by genre, separately for calibration and evaluation."""

import functools
import re
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from sasa_export.prompts.prompt import Prompt

FORMS = ("behind long text", "in front of long text", "inside long text", "in a document")
SETTINGS = (*FORMS, "system prompt of a page", "eight turns")
FILE = Path(__file__).with_suffix(".toml")


@functools.cache
def texts_of(part: str) -> dict[str, Any]:
    """Return the texts for "calibration" or "evaluation": `genres`, pieces of text by genre; `turns`, pairs of turns;
    `systems`, system prompts; `leads`, sentences that announce a request inside a document."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))[part]


def lengthened(prompt: Prompt, setting: str, words: int, part: str, rng: Random) -> Prompt:
    """Return the request in one of `SETTINGS`, with about `words` words of one genre.

    System prompts and turns keep their length. `kind` holds the genre, so that choices are judged on unseen genres.

    Args: part: "calibration" or "evaluation".
    """
    texts = texts_of(part)
    if setting == "system prompt of a page":
        return replace(prompt, before=(("system", rng.choice(texts["systems"])),), setting=setting, kind=setting)
    if setting == "eight turns":
        pairs = rng.sample(texts["turns"], 8)
        turns = tuple(turn for said, answered in pairs for turn in (("user", said), ("assistant", answered)))
        return replace(prompt, before=turns, setting=setting, kind=setting)
    (genre, around), asked = _filler(texts["genres"], words, rng), prompt.prompt
    whole = "".join(around).strip()
    first, second = ("".join(half).strip() for half in (around[: len(around) // 2], around[len(around) // 2 :]))
    text = {
        "behind long text": f"{whole}\n\n{asked}",
        "in front of long text": f"{asked}\n\n{whole}",
        "inside long text": f"{first}\n\n{asked}\n\n{second}",
        "in a document": f"{rng.choice(texts['leads'])}\n\n{first} {asked} {second}",
    }[setting]
    return replace(prompt, prompt=text, question=prompt.question or asked, setting=setting, kind=f"long text: {genre}")


def _filler(genres: dict[str, Sequence[str]], words: int, rng: Random) -> tuple[str, list[str]]:
    """Return a random genre and up to `words` of its words, with trailing space. Other genres fill what is missing."""
    found: list[str] = []
    order = rng.sample(sorted(genres), len(genres))
    for genre in order:
        for piece in rng.sample(genres[genre], len(genres[genre])):
            found += [*re.findall(r"\S+\s*", piece.strip()), "\n\n"]
            if len(found) >= words:
                return order[0], found[:words]
    return order[0], found
