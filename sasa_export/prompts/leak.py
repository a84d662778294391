"""Prevent leaks from training into test data: prompts that share a picture or a question form one group.

Pictures in files are compared by their bytes, not their names. Questions are compared by their words; case, space and
punctuation do not count. Drawn pictures are compared by the question alone.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace

from scipy.cluster.hierarchy import DisjointSet

from sasa_export.errors import DataError
from sasa_export.manifest import digest
from sasa_export.prompts.prompt import Prompt, asked


def normalised(text: str) -> str:
    """Return a text's words (letters, marks, numbers) casefolded, single-spaced; without words, the casefolded text."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words = "".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in folded)
    return " ".join(words.split()) or " ".join(folded.split())


def grouped(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts with one `group` for all that share a group, picture or question.

    Links chain: a prompt that shares its picture with a second and its question with a third joins all three.
    """
    sets = DisjointSet(range(len(prompts)))
    first: dict[tuple[str, str], int] = {}
    for row, (prompt, bonds) in enumerate(zip(prompts, _bonds(prompts), strict=True)):
        for bond in [("group", prompt.group), *bonds]:
            sets.merge(row, first.setdefault(bond, row))
    return [replace(prompt, group=f"group {sets[row]}") for row, prompt in enumerate(prompts)]


def check_disjoint(a: Sequence[Prompt], b: Sequence[Prompt]) -> None:
    """Raise DataError if a prompt of `b` shares a picture or question with `a`. The message names it."""
    seen = {bond: prompt for prompt, bonds in zip(a, _bonds(a), strict=True) for bond in bonds}
    for prompt, bonds in zip(b, _bonds(b), strict=True):
        for kind, value in bonds:
            other = seen.get((kind, value))
            if other is not None:
                shared = prompt.picture if kind == "picture" else repr(asked(prompt)[:120])
                raise DataError(
                    f"the sets leak: the {kind} {shared} is of {other.source} {other.name} and of {prompt.source} "
                    f"{prompt.name}. What a probe is fitted on cannot measure it: give other data."
                )


def _bonds(prompts: Sequence[Prompt]) -> Iterator[list[tuple[str, str]]]:
    """Yield each prompt's bonds: its normalised question and its picture's digest."""
    digests = {picture: digest(picture) for picture in {prompt.picture for prompt in prompts} if picture is not None}
    for prompt in prompts:
        question = normalised(asked(prompt))
        bonds = [("question", question)] if question else []
        yield bonds + ([("picture", digests[prompt.picture])] if prompt.picture is not None else [])
