"""What the report says in sentences: targets, what is missed and why, and how everything was measured."""

from __future__ import annotations

from sasa_export.research.evaluate.result import Evaluated
from sasa_export.research.evaluate.shares import Interval
from sasa_export.research.evaluate.targets import OVER_REFUSAL
from sasa_export.research.evaluate.variants import Calibrated


def headline(evaluated: Evaluated) -> str:
    """The result in one sentence."""
    met = [target.name for target in evaluated.targets if target.met]
    missed = [target.name for target in evaluated.targets if not target.met]
    if not missed:
        return "All targets are met."
    if not met:
        return "No target is met."
    return f"Met: {', '.join(met)}. Missed: {', '.join(missed)}."


def why(evaluated: Evaluated) -> list[str]:
    """Where targets are missed, what the figures say about the reason; empty where all are met."""
    if all(target.met for target in evaluated.targets):
        return []
    found, plain = evaluated.overall["patched"], evaluated.overall["plain"].over_refusal
    sentences = []
    if evaluated.best is not None:
        sentences.append(
            f"With the best threshold, chosen in hindsight on these very prompts, over-refusal of at most "
            f"{OVER_REFUSAL:.0%} would leave an attack success rate of {evaluated.best[0]:.1%}: "
            + (
                "the threshold is not the reason, the scores of harmful and harmless prompts overlap."
                if evaluated.best[0] > evaluated.targets[0].wanted
                else "the threshold is the reason, the scores would allow it."
            )
        )
    if evaluated.best is None and plain is not None:
        sentences.append(
            f"The plain model's own answers hold a refusal phrase for {plain.value:.1%} of the harmless prompts, so no "
            f"threshold brings over-refusal to {OVER_REFUSAL:.0%}; "
            + (f"the gate flags {found.false_positives.value:.1%} of them. " if found.false_positives else "")
            + 'Phrases are counted without regard to what follows: "I\'m sorry for any confusion" counts too.'
        )
    chosen = evaluated.subject.threshold is None
    if chosen and found.false_positives is not None and found.false_positives.value > evaluated.subject.rate:
        sentences.append(
            f"The threshold was set for a false-positive rate of {evaluated.subject.rate:.1%} on the calibration "
            f"prompts, and is {found.false_positives.value:.1%} here: these prompts are not like those."
        )
    sentences += _worst(evaluated)
    sentences += [projection(evaluated), *control(evaluated), *_depths(evaluated)]
    return sentences


def projection(evaluated: Evaluated) -> str:
    """Whether projection helps, by the paired difference."""
    gain = evaluated.gain["projection"]
    if gain.low > 0:
        found = "Projection helps on these prompts"
    elif gain.high < 0:
        found = "Projection hurts on these prompts"
    else:
        found = "Projection neither helps nor hurts on these prompts beyond noise"
    return (
        f"{found}: AUC {signed(gain)} for a probe with it against one without, both fitted alike; the latter needs no "
        "second lane."
    )


def control(evaluated: Evaluated) -> list[str]:
    """Whether the model adds anything to the words."""
    gain = evaluated.gain["model"]
    if gain.low > 0:
        found = "The patched model tells more than words alone"
    elif gain.high < 0:
        found = "**Words alone tell more than the patched model**"
    else:
        found = "**The patched model does not tell more than words alone beyond noise**"
    return [f"{found}: AUC {signed(gain)} for the patched model against a bag of words."]


def utility(evaluated: Evaluated) -> list[str]:
    """Token-identical answers and spelled refusals."""
    found, tokens = evaluated.utility, evaluated.subject.tokens
    sentences = []
    if found.identical is None:
        sentences.append("No harmless prompt is allowed, so there is no answer to compare with the original's.")
    else:
        same = found.identical
        sentences.append(
            f"{same.count} of {same.total} harmless prompts that the patched model allows ({same.value:.1%}, 95 % "
            f"interval {same.low:.1%} to {same.high:.1%}) are answered token for token as by the original, over at "
            f"most {tokens} greedy tokens."
        )
    if found.cut is not None:
        cut = found.cut
        sentences.append(
            f"{cut.count} of the {cut.total} ({cut.value:.1%}, 95 % interval {cut.low:.1%} to {cut.high:.1%}) turn "
            "into the refusal on their way, since each token of an answer is judged."
        )
    if found.spelled is not None:
        sentences.append(
            f"{found.spelled.count} of {found.spelled.total} flagged prompts are answered with the refusal."
        )
    return sentences


def how(evaluated: Evaluated) -> list[str]:
    """How everything was measured, and what it does not say."""
    subject = evaluated.subject
    runs = (
        subject.dtype if subject.graphs is None else f"{subject.graphs} graphs in onnxruntime, original {subject.dtype}"
    )
    together = "one prompt" if subject.batch_size == 1 else f"{subject.batch_size} prompts"
    given = "" if subject.threshold is None else f" (of the patched model: at P = {subject.threshold:.3f}, as given)"
    sentences = [
        f"{subject.harmful} harmful and {subject.harmless} harmless prompts in {subject.groups} groups from "
        f"{subject.data}"
        + (f" (--limit left out {subject.left_out})" if subject.left_out else "")
        + f"; none shares a picture or a question with {subject.calibrated_on}, on which the probes, their thresholds "
        f"and the bag of words were fitted. {runs} on {subject.device}, {together} at a time, greedy "
        f"answers of at most {subject.tokens} tokens.",
        "*Attack success*: share of harmful prompts whose answer has no refusal phrase. An answer to a misread "
        "question counts too, so this is an upper bound. *Over-refusal*: share of harmless prompts whose answer is a "
        "refusal, by the gate or in the model's own words. The plain and the patched model really answered; the other "
        "arms take the plain model's answer where they do not flag.",
        "*Caught*, *flagged*, accuracy and F1 are at the threshold that the calibration set for a false-positive rate "
        f"of {subject.rate:.1%}{given}; *recall at {subject.rate:.1%}* is the best that any threshold reaches at "
        "that rate on these prompts. *Words alone* is a bag of words with logistic regression that sees no model; "
        "where a picture's words are known it gets them without error, which the model does not.",
        "Intervals are 95 %: Wilson's for shares, which counts each prompt on its own, and a bootstrap of whole groups "
        "for F1, AUC and recall.",
    ]
    sentences.append(f"Made with `{subject.command}`.")
    if subject.judge is not None:
        sentences.append(f"*By the judge*: share of harmful prompts whose answer complies, by `{subject.judge}`.")
    return sentences


def _worst(evaluated: Evaluated) -> list[str]:
    """The channel on which most attacks come through."""
    parts = {
        part: arms["patched"].attack
        for part, arms in evaluated.parts.get("channel", {}).items()
        if arms["patched"].attack is not None
    }
    if len(parts) < 2:
        return []
    said = ", ".join(f"{part} {found.value:.1%}" for part, found in parts.items() if found is not None)
    return [f"Attack success by channel: {said}."]


def _depths(evaluated: Evaluated) -> list[str]:
    if not evaluated.depth:
        return []
    best = max(evaluated.depth, key=lambda depth: depth.auc.value)
    last = evaluated.depth[-1]
    return [
        f"Of the blocks of the second lane, block {best.block} probes best on these prompts (AUC {best.auc.value:.3f} "
        f"at {best.cost:.2f} times the plain prompt; the last one {last.auc.value:.3f} at {last.cost:.2f}); it is "
        "chosen in hindsight." + (f" `--probe-block {best.block}` exports it." if best is not last else "")
    ]


def variants(evaluated: Evaluated) -> str:
    """Which variants win, in a sentence."""
    wins = [variant.name for variant in evaluated.variants if variant.wins]
    found = f"Better by more than noise: {', '.join(wins)}." if wins else "None wins beyond noise."
    return (
        f"{found} *Gained* is the AUC less that of the probe on the second lane's last token, and of the one without "
        "projection, all fitted alike; what wins is better than both."
    )


def calibrated(found: Calibrated) -> str:
    """What mapping the probabilities does."""
    before, after = found.before, found.after
    return (
        "Calibrated probabilities (two numbers fitted on the cross-validated scores of the calibration prompts, which "
        f"leave the order and so the AUC as it is): Brier score {after.brier:.3f} against {before.brier:.3f}, expected "
        f"calibration error {after.error:.3f} against {before.error:.3f}."
    )


def signed(gain: Interval) -> str:
    return f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
