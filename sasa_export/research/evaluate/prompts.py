"""What is asked: the evaluation prompts, and the calibration prompts from which they must be apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from sasa_export.errors import EvaluateError
from sasa_export.prompts import Prompt, builtin, builtin_evaluation, calibration_prompts, check_disjoint, load_all
from sasa_export.research.locate.prompts import spaced

MISSING = {  # what cannot be measured without a label, and what to add
    1: ("harmful", "attack success and detection", "figstep:DIR or mm-safetybench:DIR"),
    0: ("harmless", "over-refusal and detection", "xstest:FILE,subset=safe or vlguard:DIR,subset=safe_safes"),
}

Pieces = Callable[[str], int]  # how many tokens a word has, for the pictures of the built-in sets


def evaluation_prompts(specs: Sequence[str], pieces: Pieces) -> list[Prompt]:
    """The prompts of all specs, or the built-in evaluation set. EvaluateError where a label is missing."""
    prompts = load_all(specs) if specs else builtin_evaluation(pieces)
    for label, (what, measures, example) in MISSING.items():
        if not any(prompt.label == label for prompt in prompts):
            raise EvaluateError(
                f"the data has no {what} prompts (label {label}), so {measures} cannot be measured. Add them with "
                f"another --data, for example --data {example}."
            )
    return prompts


def fitting_prompts(
    given: Sequence[str], made_on: Sequence[str], evaluation: Sequence[Prompt], pieces: Pieces
) -> tuple[list[Prompt], str]:
    """What the arms are fitted on, and its name: `given`, or what the patched model was calibrated on, `made_on`.

    Raises DataError where they share a picture or a question with the evaluation prompts.
    """
    specs = given or made_on
    prompts = calibration_prompts(specs) if specs else builtin(pieces)
    check_disjoint(prompts, evaluation)
    return prompts, ", ".join(specs) or "the built-in calibration set"


def limited(prompts: Sequence[Prompt], count: int | None) -> list[Prompt]:
    """About `count` prompts in whole groups, evenly spaced, the kinds of groups in proportion; all without a count."""
    if count is None or count >= len(prompts):
        return list(prompts)
    members: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
    for prompt in prompts:
        members[prompt.group].add((prompt.source, prompt.attack, prompt.label))
    kinds: dict[frozenset[tuple[Any, ...]], list[str]] = defaultdict(list)
    for group, held in members.items():
        kinds[frozenset(held)].append(group)
    kept: set[str] = set()
    for groups in kinds.values():
        kept.update(spaced(groups, max(1, round(len(groups) * count / len(prompts)))))
    return [prompt for prompt in prompts if prompt.group in kept]
