"""What a written directory answered, beside what the original model answered: the one comparison for both formats.

How many verdicts the type of graphs changes is seen on prompts of the calibration set, which they judge again.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sasa_export.probe.calibration import Calibration
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Check
from sasa_export.writers.cases import TOKENS

# Largest difference of P(unsafe), and of logits relative to the largest of them: where torch runs a prompt alone once
# more, and where a padded batch or another runtime rounds otherwise.
SAME = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
ROUNDED = {"float32": 1e-4, "bfloat16": 0.15, "float16": 2e-2}
QUANTIZED = 0.15  # any other type, whose logits are not held to the original's

SEED = 0  # of the draw
# Prompts that are judged again, and the largest share whose verdict may change: what the threshold itself may get wrong
# of the harmless ones.
JUDGED_AGAIN, MOST_CHANGED = 200, 0.02

Entry = dict[str, Any]
Pairs = list[tuple[Entry, Entry]]  # a case as it was written, and what was found for it


def tolerance(dtype: str, original: str, *, graphs: bool) -> float:
    """Of P(unsafe), between a directory that runs in `dtype` and an original that ran in `original`."""
    rounded = max(ROUNDED.get(dtype, QUANTIZED), ROUNDED[original])
    return rounded if graphs or dtype != original else SAME[original]


def compare(
    written: Entry, found: Entry, sasa: dict[str, Any], dtype: str, *, graphs: bool, quantized: bool = False
) -> list[Check]:
    """Checks of what a fresh process found against the cases.

    Args:
        written: what `read_cases` gives.
        found: what `fresh/` printed.
        sasa: the settings in config.json.
        dtype: what the directory ran in: a type, or for graphs theirs, or the quantization that it was loaded with.
        graphs: whether ONNX graphs were run, and not torch.
        quantized: whether the original is; it may round each state by what else is in its batch.
    """
    observed = sasa.get("gate") == "observe"
    pairs: Pairs = list(zip(written["cases"], found["cases"], strict=True))
    most = tolerance(dtype, written["dtype"], graphs=graphs)
    allowed = [pair for pair in pairs if observed or not refuses(pair[1], sasa)]
    refused = [have["tokens"] for _, have in pairs if not observed and refuses(have, sasa)]
    # Where two runtimes round half-precision numbers, a greedy answer may leave the original's at any token.
    exact = dtype == written["dtype"] and (dtype == "float32" or not graphs)
    how = f"{dtype}{' graphs' * graphs} on {found['about']['provider']}, {written['dtype']} original"
    return [
        _probabilities(pairs, most, how),
        *_batches(pairs, QUANTIZED if quantized else ROUNDED[written["dtype"]], quantized=quantized),
        _verdicts(pairs, sasa, most),
        _refusals(refused, sasa["refusal_token_ids"], observed=observed),
        _logits(allowed, most if dtype in ROUNDED else None),
        _answers(allowed, sasa["refusal_token_ids"], found["about"]["not_followed"], exact=exact),
    ]


def refuses(entry: Entry, sasa: dict[str, Any]) -> bool:
    """The verdict that a P(unsafe) stands for; NaN is refused."""
    return not entry["unsafe_probability"] < sasa["threshold"]


def _apart(wanted: Sequence[float], found: Sequence[float]) -> float:
    """The largest difference; NaN where there is one, which the built-in max could lose."""
    return float(np.abs(np.subtract(wanted, found)).max())


def _probabilities(pairs: Pairs, most: float, how: str) -> Check:
    wanted, found = zip(
        *((case["unsafe_probability"], have["unsafe_probability"]) for case, have in pairs), strict=True
    )
    apart = _apart(wanted, found)
    detail = f"largest difference {apart:.1e} over {len(pairs)} prompts, tolerance {most:g} ({how})"
    return Check("P(unsafe) is the original's", apart <= most, detail)


def _batches(pairs: Pairs, most: float, *, quantized: bool) -> list[Check]:
    """The calibration ran the same prompts in batches; a P(unsafe) that is far apart there was padded wrongly."""
    both = [(case["calibrated"], case["unsafe_probability"]) for case, _ in pairs if case.get("calibrated") is not None]
    if not both:
        return []
    apart = _apart(*zip(*both, strict=True))
    detail = f"largest difference {apart:.1e} over {len(both)} prompts, which ran in batches there, tolerance {most:g}"
    if quantized and not apart <= most:
        detail += "; states of 4 bits round by what shares their batch: calibrate with --batch-size 1"
    return [Check("P(unsafe) is that of the calibration", apart <= most, detail)]


def _verdicts(pairs: Pairs, sasa: dict[str, Any], most: float) -> Check:
    clear = [pair for pair in pairs if abs(pair[0]["unsafe_probability"] - sasa["threshold"]) > most]
    same = sum(refuses(case, sasa) == refuses(have, sasa) for case, have in clear)
    changed = sum(refuses(case, sasa) != refuses(have, sasa) for case, have in pairs)
    detail = f"{same} of {len(clear)} outside the tolerance of the threshold; {changed} of {len(pairs)} changed"
    return Check("verdicts are the original's", same == len(clear), detail)


def _is_refusal(tokens: list[int], refusal: list[int]) -> bool:
    return tokens[: len(refusal)] == refusal[:TOKENS]


def _refusals(refused: list[list[int]], refusal: list[int], *, observed: bool) -> Check:
    said = sum(_is_refusal(tokens, refusal) for tokens in refused)
    detail = f"{said} of {len(refused)}" if refused else "no case is refused at this threshold"
    detail = "none is refused, since the gate observes" if observed else detail
    return Check("refused prompts say the refusal", said == len(refused), detail)


def _logits(allowed: Pairs, most: float | None) -> Check:
    """The first token's largest logits, relative to the largest of them; None holds them to no tolerance."""
    name = "allowed prompts have the original's logits"
    if not all(have["finite"] for _, have in allowed):
        return Check(name, False, "some are NaN or infinite")
    wanted = [value for case, _ in allowed for _, value in case["logits"]]
    if not wanted:
        return Check(name, True, "none to compare")
    apart = _apart(wanted, [value for _, have in allowed for value in have["logits"]])
    detail = f"largest difference {apart:.1e} over the {len(wanted)} largest of the first token"
    if most is None:
        return Check(name, True, f"{detail}, not held to a tolerance")
    most *= max(1.0, *map(abs, wanted))
    return Check(name, apart <= most, f"{detail}, tolerance {most:.1g}")


def _answers(allowed: Pairs, refusal: list[int], not_followed: list[str], *, exact: bool) -> Check:
    """The greedy answers: the original's where they are `exact`, and never the refusal in their place."""
    name = "allowed prompts are answered as by the original"
    if not allowed:
        return Check(name, True, "no case is allowed at this threshold")
    others = [have["tokens"] for case, have in allowed if case["tokens"] != have["tokens"]]
    refused = sum(_is_refusal(tokens, refusal) for tokens in others)
    detail = f"{len(allowed) - len(others)} of {len(allowed)}, token for token over {TOKENS} greedy tokens"
    if not_followed:
        detail += f" (not required: generation_config.json sets {', '.join(not_followed)}, which is not followed here)"
    elif not exact:
        detail += " (required only where both run in the same type, and graphs in float32)"
    if refused:
        detail += f"; {refused} refused in spite of their verdict"
    return Check(name, not refused and (not others or not exact or bool(not_followed)), detail)


def draw(calibration: Calibration) -> tuple[list[Prompt], list[float]]:
    """At most JUDGED_AGAIN prompts, in order, and their P(unsafe) in the calibration.

    Labels and channels take turns, so that a small kind comes in whole.
    """
    import pandas as pd

    kinds = pd.DataFrame(
        [(prompt.label, prompt.channel) for prompt in calibration.prompts], columns=["label", "channel"]
    )
    shuffled = kinds.sample(frac=1, random_state=SEED)
    turns = shuffled.assign(turn=shuffled.groupby(["label", "channel"]).cumcount())
    rows = sorted(turns.sort_values(["turn", "label", "channel"]).index[:JUDGED_AGAIN])
    return [calibration.prompts[row] for row in rows], [float(calibration.final[row]) for row in rows]


def check_changed(
    before: Sequence[float], after: Sequence[float], threshold: float, tolerance: float, whole: int, *, exact: bool
) -> Check:
    """Compare the graphs' P(unsafe), (judged,), with the calibration's of its `whole` prompts; NaN is refused.

    At most the share MOST_CHANGED of the verdicts may change and, where all is float32 (`exact`), none but by rounding:
    none that lay farther than the `tolerance` from the threshold.
    """
    was, now = np.asarray(before), np.asarray(after)
    allowed, refused = was < threshold, ~(now < threshold)
    changed = allowed == refused
    clear = int((changed & (np.abs(was - threshold) > tolerance)).sum())
    share = float(changed.mean())
    drawn = f"all {whole}" if len(was) == whole else f"{len(was)} drawn from {whole}"
    detail = (
        f"{share:.1%} changed of {drawn} ({(changed & ~allowed).sum()} now answered, {(changed & allowed).sum()} now "
        f"refused), at most {MOST_CHANGED:.1%} may; {clear} of them farther than {tolerance:g} from the threshold"
    )
    passed = share <= MOST_CHANGED and not (exact and clear)
    return Check("verdicts hold over the calibration prompts", passed, detail + " (none may be)" * exact)
