"""Verification cases: prompts, and what the original model and the calibrated lane say of them.

They are written into the patched directory, so that it can be verified later without the original.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasa_export.calibrate.data import Prompt
from sasa_export.calibrate.features import collect, encode, place
from sasa_export.calibrate.fit import Probe
from sasa_export.graph import LayerGraph

FOLDER = "sasa-verify"
CASES = "cases.json"
TOKENS = 20


@dataclass(frozen=True)
class Case:
    """One prompt with the expected P(unsafe), and the original's greedy answer as token ids."""

    name: str
    prompt: str
    image: str | None  # file name in the folder
    unsafe_probability: float
    tokens: tuple[int, ...]


def choose(prompts: Sequence[Prompt], scores: Sequence[float] | None, per_kind: int = 4) -> list[Prompt]:
    """A few prompts of each label and channel: spread over the scores where there are some, else over the set."""
    chosen: list[Prompt] = []
    for label in (1, 0):
        for channel in ("text", "picture"):
            rows = [row for row, prompt in enumerate(prompts) if (prompt.label, prompt.channel) == (label, channel)]
            if scores is not None:
                rows.sort(key=lambda row: (scores[row], row))
            step = max(1, (len(rows) - 1) // max(1, per_kind - 1))
            chosen += [prompts[row] for row in rows[::step][:per_kind]]
    return chosen


def expect(
    model: Any, processor: Any, lane: LayerGraph, probe: Probe, prompts: Sequence[Prompt]
) -> list[tuple[float, tuple[int, ...]]]:
    """P(unsafe) and the greedy answer of the unpatched model for each prompt, one at a time."""
    import torch

    from sasa_export.calibrate.fit import probability

    expected = []
    for prompt in prompts:
        features = collect(model, processor, lane, [prompt], batch_size=1)
        score = probability(features.projected.astype("float64"), probe.weight.astype("float64"), probe.bias)[0]
        inputs = place(encode(processor, [prompt]), model)
        with torch.no_grad():
            answer = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, num_beams=1)
        tokens = answer[0, inputs["input_ids"].shape[1] :].tolist()
        expected.append((float(score), tuple(tokens)))
    return expected


def write_cases(
    prompts: Sequence[Prompt], expected: Sequence[tuple[float, tuple[int, ...]]], directory: Path, settings: dict
) -> None:
    """Write the cases with their pictures; `settings` says in which dtype they were computed."""
    folder = directory / FOLDER
    folder.mkdir()
    cases = []
    for number, (prompt, (score, tokens)) in enumerate(zip(prompts, expected, strict=True)):
        image = None
        if prompt.image is not None:
            image = f"{number:02}.png"
            prompt.image().save(folder / image)
        cases.append(
            {
                "name": prompt.name,
                "prompt": prompt.prompt,
                "image": image,
                "unsafe_probability": score,
                "tokens": list(tokens),
            }
        )
    text = json.dumps({**settings, "cases": cases}, indent=1, ensure_ascii=False)
    (folder / CASES).write_text(text + "\n", encoding="utf-8")


def read_cases(directory: Path) -> tuple[dict[str, Any], list[Case]]:
    """The settings and cases of a patched directory; no cases where it was written without."""
    path = directory / FOLDER / CASES
    if not path.exists():
        return {}, []
    data = json.loads(path.read_text(encoding="utf-8"))
    cases = [
        Case(case["name"], case["prompt"], case["image"], case["unsafe_probability"], tuple(case["tokens"]))
        for case in data.pop("cases")
    ]
    return data, cases
