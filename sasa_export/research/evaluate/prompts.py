"""What is asked: the evaluation prompts, and the calibration prompts from which they must be apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sasa_export.errors import EvaluateError
from sasa_export.prompts import DataError, calibration_prompts, check_disjoint, load_all
from sasa_export.prompts.prompt import Prompt, builtin
from sasa_export.research.evaluate.guarded import Guarded
from sasa_export.research.evaluate.options import EvaluateOptions

MISSING = {  # what cannot be measured without a label, and what to add
    1: ("harmful", "attack success and detection", "figstep:DIR or mm-safetybench:DIR"),
    0: ("harmless", "over-refusal and detection", "xstest:FILE,subset=safe or vlguard:DIR,subset=safe_safes"),
}


@dataclass(frozen=True)
class Asked:
    """The prompts of an evaluation, and those that every fitted arm is fitted on; they share no picture or question."""

    evaluation: tuple[Prompt, ...]
    calibration: tuple[Prompt, ...]
    left_out: int  # prompts that --limit left out
    calibrated_on: str


def gather(options: EvaluateOptions, guarded: Guarded, processor: Any) -> Asked:
    """Read all prompts. Raises DataError or EvaluateError for a leak, and where a label is missing."""

    def pieces(word: str) -> int:
        return len(processor.tokenizer.encode(f" {word}", add_special_tokens=False))

    everything = load_all(options.data) if options.data else _builtin(pieces)
    for label, (what, measures, example) in MISSING.items():
        if not any(prompt.label == label for prompt in everything):
            raise EvaluateError(
                f"the data has no {what} prompts (label {label}), so {measures} cannot be measured. Add them with "
                f"another --data, for example --data {example}."
            )
    specs = options.calibration or tuple(guarded.made.get("calibration") or ())
    try:
        fitted_on = calibration_prompts(specs) if specs else builtin(pieces)
    except DataError as error:
        if options.calibration:
            raise
        raise EvaluateError(f"what {guarded.directory} was calibrated on: {error} Or give --calibration.") from None
    check_disjoint(fitted_on, everything)
    chosen = limited(everything, options.limit)
    return Asked(
        tuple(chosen),
        tuple(fitted_on),
        len(everything) - len(chosen),
        ", ".join(specs) if specs else "the built-in calibration set",
    )


def _builtin(pieces: Callable[[str], int]) -> list[Prompt]:
    from sasa_export.prompts.builtin_evaluation import builtin_evaluation

    return builtin_evaluation(pieces)


def limited(prompts: Sequence[Prompt], count: int | None) -> list[Prompt]:
    """About `count` prompts in whole groups, evenly spaced, the kinds of groups in proportion; all without a count."""
    if count is None or count >= len(prompts):
        return list(prompts)
    members: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        members[prompt.group].append(prompt)
    kinds: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for group, held in members.items():
        kinds[tuple(sorted({(prompt.source, prompt.attack, prompt.label) for prompt in held}))].append(group)
    kept: set[str] = set()
    for groups in kinds.values():
        wanted = max(1, round(len(groups) * count / len(prompts)))
        kept |= {groups[(2 * place + 1) * len(groups) // (2 * wanted)] for place in range(wanted)}
    return [prompt for prompt in prompts if prompt.group in kept]
