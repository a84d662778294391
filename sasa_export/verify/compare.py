"""Compares a written directory's answers with the original model's, for both formats.

Prompts of the calibration set are judged again, to count the verdicts that the graphs' type changes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sasa_export.gate import GateSpec
from sasa_export.probe.calibration import Calibration
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Check
from sasa_export.writers.cases import TOKENS

# Largest differences of P(unsafe), and of logits relative to the largest logit. SAME: torch runs a prompt alone again.
# ROUNDED: a padded batch or another runtime rounds differently.
SAME = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
ROUNDED = {"float32": 1e-4, "bfloat16": 0.15, "float16": 2e-2}
QUANTIZED = 0.15  # of P(unsafe), for any other type; its logits have no tolerance

SEED = 0  # for drawing prompts
# How many prompts are judged again, and the largest share of verdicts that may change (2 %, the default false-positive
# rate).
JUDGED_AGAIN, MOST_CHANGED = 200, 0.02

Entry = dict[str, Any]
Pairs = list[tuple[Entry, Entry]]  # a written case, and its result in the fresh process


def tolerance(dtype: str, original: str, *, graphs: bool) -> float:
    """Return the tolerance of P(unsafe) between a directory that runs in `dtype` and an original in `original`."""
    rounded = max(ROUNDED.get(dtype, QUANTIZED), ROUNDED[original])
    return rounded if graphs or dtype != original else SAME[original]


def compare(
    written: Entry, found: Entry, gate: GateSpec, dtype: str, *, graphs: bool, quantized: bool = False
) -> list[Check]:
    """Return the checks of a fresh process's results against the written cases.

    Args:
        written: the content of the file of `write_cases`.
        found: the JSON object that `fresh/` printed.
        gate: the settings in config.json.
        dtype: the type of the directory's run, or of its graphs, or the quantization that it was loaded with.
        graphs: whether ONNX graphs or mlx-vlm ran, not torch.
        quantized: whether the original is quantized. Its rounding of a state may depend on the batch.
    """
    observed, refusal = gate.observes, list(gate.refusal_token_ids)[:TOKENS]
    pairs: Pairs = list(zip(written["cases"], found["cases"], strict=True))
    most = tolerance(dtype, written["dtype"], graphs=graphs)
    allowed = [pair for pair in pairs if observed or not refuses(pair[1], gate)]
    refused = [have["tokens"] for _, have in pairs if not observed and refuses(have, gate)]
    # Two runtimes round half-precision numbers differently, and a greedy answer may diverge at any token.
    exact = dtype == written["dtype"] and (dtype == "float32" or not graphs)
    how = f"{dtype} on {found['about']['provider']}, {written['dtype']} original"
    return [
        _probabilities(pairs, most, how),
        *_batches(pairs, QUANTIZED if quantized else ROUNDED[written["dtype"]], quantized=quantized),
        _verdicts(pairs, gate, most),
        _refusals(refused, refusal, observed=observed),
        _logits(allowed, most if dtype in ROUNDED else None),
        _answers(allowed, refusal, found["about"]["not_followed"], exact=exact),
    ]


def refuses(entry: Entry, gate: GateSpec) -> bool:
    """Return whether the result's P(unsafe) is refused. NaN is refused."""
    return not entry["unsafe_probability"] < gate.threshold


def _apart(both: Sequence[tuple[float, float]]) -> float:
    """Return the largest difference within the pairs, or NaN if one is NaN, which the built-in max could lose."""
    return float(np.abs(np.diff(both)).max())


def _probabilities(pairs: Pairs, most: float, how: str) -> Check:
    apart = _apart([(case["unsafe_probability"], have["unsafe_probability"]) for case, have in pairs])
    detail = f"largest difference {apart:.1e} over {len(pairs)} prompts, tolerance {most:g} ({how})"
    return Check("P(unsafe) is the original's", apart <= most, detail)


def _batches(pairs: Pairs, most: float, *, quantized: bool) -> list[Check]:
    """Compare with the calibration, which ran the same prompts in batches. A large difference means wrong padding."""
    both = [(case["calibrated"], case["unsafe_probability"]) for case, _ in pairs if case.get("calibrated") is not None]
    if not both:
        return []
    apart = _apart(both)
    detail = f"largest difference {apart:.1e} over {len(both)} prompts, which ran in batches there, tolerance {most:g}"
    if quantized and not apart <= most:
        detail += "; states of 4 bits round by what shares their batch: calibrate with --batch-size 1"
    return [Check("P(unsafe) is that of the calibration", apart <= most, detail)]


def _verdicts(pairs: Pairs, gate: GateSpec, most: float) -> Check:
    clear = [pair for pair in pairs if abs(pair[0]["unsafe_probability"] - gate.threshold) > most]
    same = sum(refuses(case, gate) == refuses(have, gate) for case, have in clear)
    changed = sum(refuses(case, gate) != refuses(have, gate) for case, have in pairs)
    detail = f"{same} of {len(clear)} outside the tolerance of the threshold; {changed} of {len(pairs)} changed"
    return Check("verdicts are the original's", same == len(clear), detail)


def _refusals(refused: list[list[int]], refusal: list[int], *, observed: bool) -> Check:
    said = sum(tokens[: len(refusal)] == refusal for tokens in refused)
    detail = f"{said} of {len(refused)}" if refused else "no case is refused at this threshold"
    detail = "none is refused, since the gate observes" if observed else detail
    return Check("refused prompts say the refusal", said == len(refused), detail)


def _logits(allowed: Pairs, most: float | None) -> Check:
    """Compare the first token's largest logits, relative to the largest. None means no tolerance."""
    name = "allowed prompts have the original's logits"
    if not all(have["finite"] for _, have in allowed):
        return Check(name, False, "some are NaN or infinite")
    found = ((case["logits"], have["logits"]) for case, have in allowed)
    both = [(value, there) for wanted, had in found for (_, value), there in zip(wanted, had, strict=True)]
    if not both:
        return Check(name, True, "none to compare")
    detail = f"largest difference {_apart(both):.1e} over the {len(both)} largest of the first token"
    if most is None:
        return Check(name, True, f"{detail}, not held to a tolerance")
    most *= max(1.0, *(abs(wanted) for wanted, _ in both))
    return Check(name, _apart(both) <= most, f"{detail}, tolerance {most:.1g}")


def _answers(allowed: Pairs, refusal: list[int], not_followed: list[str], *, exact: bool) -> Check:
    """Compare the greedy answers. They must equal the original's if `exact`, and may never be the refusal."""
    name = "allowed prompts are answered as by the original"
    if not allowed:
        return Check(name, True, "no case is allowed at this threshold")
    others = [have["tokens"] for case, have in allowed if case["tokens"] != have["tokens"]]
    refused = sum(tokens[: len(refusal)] == refusal for tokens in others)
    detail = f"{len(allowed) - len(others)} of {len(allowed)}, token for token over {TOKENS} greedy tokens"
    if not_followed:
        detail += f" (not required: generation_config.json sets {', '.join(not_followed)}, which is not followed here)"
    elif not exact:
        detail += " (required only where both run in the same type, and graphs in float32)"
    if refused:
        detail += f"; {refused} refused in spite of their verdict"
    return Check(name, not refused and (not others or not exact or bool(not_followed)), detail)


def draw(calibration: Calibration) -> tuple[list[Prompt], list[float]]:
    """Return at most JUDGED_AGAIN prompts, in order, and their P(unsafe) in the calibration.

    The draw takes labels and channels in turn, so that a small group is drawn completely.
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
    """Compare the graphs' P(unsafe), (judged,), with the calibration's, drawn from `whole` prompts. NaN is refused.

    At most the share MOST_CHANGED of the verdicts may change. In float32 (`exact`), only rounding may change a verdict:
    its P(unsafe) must lie within `tolerance` of the threshold.
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
