"""Score unlabelled prompts: what a gate would refuse, and which threshold suits them.

Prompts -> P(unsafe), batch by batch -> a file of verdicts, a summary, a threshold.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sasa_export.errors import CalibrationError, EmitError, EvaluateError, SasaExportError
from sasa_export.files import write_whole
from sasa_export.models import read_config
from sasa_export.onnx import graphs_of
from sasa_export.probe.fit import threshold_for
from sasa_export.probe.intervals import Share, wilson
from sasa_export.prompts import Prompt, for_model, load
from sasa_export.prompts.prompt import batches
from sasa_export.report import Silent
from sasa_export.research.evaluate.models import load_patched, read_gate
from sasa_export.writers.config import config_text

BARS, LONGEST = 10, 40  # bars in the histogram; characters of its longest bar


@dataclass(frozen=True)
class Scored:
    """P(unsafe) of prompts, (prompts,), the gate's threshold, and the threshold that --refuse-at-most proposes."""

    prompts: list[Prompt]
    probabilities: np.ndarray
    threshold: float
    proposed: float | None

    def refused(self, threshold: float) -> Share:
        """Return the share of prompts that a threshold refuses."""
        return wilson(int((self.probabilities >= threshold).sum()), len(self.prompts))

    def lines(self) -> Iterator[str]:
        """Yield one JSON object per prompt, with the same field names as a verdict's log record."""
        for prompt, probability in zip(self.prompts, self.probabilities.tolist(), strict=True):
            verdict = "refused" if probability >= self.threshold else "allowed"
            yield json.dumps({"id": prompt.name, "probability": probability, "verdict": verdict}) + "\n"

    def summary(self) -> Iterator[str]:
        """Yield lines: the refused share, a histogram of P(unsafe), and what the proposed threshold would refuse."""
        refused, total = self.refused(self.threshold), len(self.prompts)
        yield f"{total} prompts, {refused.count} refused at the threshold {self.threshold:.4f}: {refused}"
        counts, edges = np.histogram(self.probabilities, BARS, (0.0, 1.0))
        for count, low, high in zip(counts, edges, edges[1:], strict=False):
            mark = "  <- threshold" if low <= self.threshold < high else ""
            yield f"{low:.1f} to {high:.1f} {count:>8} {'#' * round(LONGEST * count / max(counts))}{mark}"
        if self.proposed is not None:
            would = self.refused(self.proposed)
            yield f"the threshold {self.proposed:.6g} would refuse {would.count}: {would}"


def score(
    directory: Path,
    data: str,
    out: Path,
    *,
    refuse_at_most: float | None = None,
    write_threshold: bool = False,
    batch_size: int = 16,
    device: str = "auto",
    report: Silent | None = None,
) -> Scored:
    """Judge prompts with a patched directory, and write one line per prompt to `out`.

    Where judging raises SasaExportError, nothing is written. Args: as in `sasa-export score --help`.
    """
    report = report or Silent()
    gate = read_gate(directory)
    if write_threshold:
        _check_writable(directory, refuse_at_most)
    if out.exists():
        raise EmitError(f"{out} is there already. Give another --out, or move it away.")
    if not out.parent.is_dir():
        raise EmitError(f"{out.parent} is no directory. Make it, or give another --out.")
    asked = load(data, "DATA", report, labelled=False)
    model = load_patched(directory, "auto", device)
    prompts = for_model(asked, model.processor, report)
    probabilities = np.zeros(len(prompts))
    with report.bar(len(prompts), "score") as advance:
        for rows in batches(prompts, batch_size):
            probabilities[rows] = model.judge([prompts[row] for row in rows])
            advance(len(rows))
    if np.isnan(probabilities).any():
        raise EvaluateError(f"{directory} gives no verdict on some prompts. Export the model again.")
    proposed = None if refuse_at_most is None else _propose(probabilities, refuse_at_most)
    found = Scored(prompts, probabilities, gate.threshold, proposed)
    write_whole(out, "".join(found.lines()))
    report.step("done", str(out))
    if write_threshold:
        config = read_config(directory)
        config["sasa"]["threshold"] = proposed
        write_whole(directory / "config.json", config_text(config))
        report.step("threshold", f"{proposed:.6g} stands in {directory / 'config.json'}")
    return found


def _check_writable(directory: Path, refuse_at_most: float | None) -> None:
    """Raise SasaExportError where no threshold would be proposed, or config.json does not hold the threshold."""
    if refuse_at_most is None:
        raise SasaExportError("--write-threshold has no effect without --refuse-at-most. Give both, or neither.")
    if graphs_of(directory):
        raise SasaExportError(
            f"the threshold lies within the graphs of {directory}. Leave --write-threshold out, and export them again "
            "with --threshold and what is proposed."
        )


def _propose(probabilities: np.ndarray, most: float) -> float:
    """Return the lowest threshold that refuses at most this share. Raise EvaluateError where none does."""
    try:
        return threshold_for(probabilities, np.zeros(len(probabilities)), most)
    except CalibrationError:
        raise EvaluateError(
            f"P(unsafe) is 1 for more than {most:g} of the prompts, so no threshold refuses as few. Raise "
            "--refuse-at-most, or calibrate anew with prompts like these."
        ) from None
