"""Verification cases: prompts with the original model's answers and the calibrated lane's P(unsafe).

The patched directory contains them, so that it can be verified later without the original.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from sasa_export.probe.fit import Probe, probability
from sasa_export.prompts.prompt import Prompt

FOLDER = "sasa-verify"
CASES = "cases.json"
TOKENS = 20
PER_KIND = 4  # prompts
LOGITS = 8  # number of logits kept: the largest of a case's first token


@dataclass(frozen=True)
class Case:
    """One prompt with the expected P(unsafe), and the original's greedy answer as token ids.

    `logits` are the largest of its first token, as pairs of token id and value. `calibrated` is P(unsafe) in the
    calibration run, where the prompt ran in a padded batch: in half precision, the numbers differ. `ids` are the
    token ids of a prompt without a picture.
    """

    prompt: Prompt
    unsafe_probability: float
    tokens: tuple[int, ...]
    logits: tuple[tuple[int, float], ...] = ()
    calibrated: float | None = None
    ids: tuple[int, ...] = ()


def known(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Return the text prompts for config.json. A patched model judges them to detect changed weights."""
    texts = [case for case in cases if case.ids]
    return [{"ids": " ".join(map(str, case.ids)), "unsafe_probability": case.unsafe_probability} for case in texts]


def choose(prompts: Sequence[Prompt], scores: Any) -> list[Prompt]:
    """Return a few prompts of one turn for each label and channel, spread over the scores, if any, or over the set.

    Each load of a patched model runs them, so the longest tenth is left out.
    """
    chosen: list[Prompt] = []
    longest = sorted(len(prompt.prompt) for prompt in prompts)[len(prompts) * 9 // 10] if prompts else 0
    short = [row for row, prompt in enumerate(prompts) if not prompt.before and len(prompt.prompt) <= longest]
    for kind in product((1, 0), ("text", "picture")):
        rows = [row for row in short if (prompts[row].label, prompts[row].channel) == kind]
        if scores is not None:
            rows.sort(key=lambda row: (scores[row], row))
        step = max(1, (len(rows) - 1) // (PER_KIND - 1))
        chosen += [prompts[row] for row in rows[::step][:PER_KIND]]
    return chosen


Asked = tuple[np.ndarray, np.ndarray, Sequence[int], Sequence[int]]


def expect(ask: Callable[[Prompt], Asked], probe: Probe, prompts: Sequence[Prompt], scores: Any) -> Iterator[Case]:
    """Yield cases from the unpatched model, one prompt at a time.

    `ask` returns a prompt's features for the probe (1, features), the logits of the first token (vocabulary,), the
    greedy answer, and a case's `ids`. `scores` holds P(unsafe) of each prompt in the calibration run; None if the user
    gave a probe.
    """
    found = () if scores is None else zip(prompts, scores, strict=True)
    calibrated = {prompt.name: float(score) for prompt, score in found}
    for prompt in choose(prompts, scores):
        state, first, tokens, ids = ask(prompt)
        score = float(probability(state.astype(np.float64), probe.weight.astype(np.float64), probe.bias)[0])
        logits = tuple((int(token), float(first[token])) for token in np.argsort(first)[: -LOGITS - 1 : -1])
        yield Case(prompt, score, tuple(tokens), logits, calibrated.get(prompt.name), tuple(ids))


def write_cases(cases: Sequence[Case], directory: Path, dtype: str) -> None:
    """Write the cases with their pictures. `dtype` is the type in which they were computed."""
    folder = directory / FOLDER
    folder.mkdir()
    entries = write_prompts([case.prompt for case in cases], folder)
    for entry, case in zip(entries, cases, strict=True):
        entry |= {name: getattr(case, name) for name in ("unsafe_probability", "calibrated", "tokens", "logits")}
    text = json.dumps({"dtype": dtype, "cases": entries}, indent=1, ensure_ascii=False)
    (folder / CASES).write_text(text + "\n", encoding="utf-8")


def write_prompts(prompts: Sequence[Prompt], folder: Path) -> list[dict[str, Any]]:
    """Write the prompts' pictures. Return the conversations for JSON, each with the name of its picture's file."""
    entries = []
    for number, prompt in enumerate(prompts):
        image = None
        if prompt.image is not None:
            image = f"{number:02}.png"
            prompt.image().save(folder / image)
        messages = prompt.conversation()
        for message in messages:
            for part in message["content"]:
                part.pop("image", None)
        entries.append({"name": prompt.name, "messages": messages, "image": image})
    return entries
