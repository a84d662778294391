"""sasa-calibration.json: the figures, and the score of every calibration prompt."""

from __future__ import annotations

import json
from pathlib import Path

from sasa_export.probe import Calibration

SCORES = "sasa-calibration.json"


def write_scores(calibration: Calibration, directory: Path) -> None:
    """`cross_validated` is P(unsafe) by a probe that saw nothing of the prompt's kind; `final` by the probe itself."""
    rows = zip(calibration.prompts, calibration.cross_validated, calibration.final, strict=True)
    data = {
        "threshold": calibration.probe.threshold,
        "max_false_positive_rate": calibration.max_false_positive_rate,
        "regularization": calibration.regularization,
        "figures": [figure.to_json() for figure in calibration.figures],
        "kinds": [figure.to_json() for figure in calibration.kinds],
        "prompts": [
            {
                **{name: getattr(prompt, name) for name in ("name", "label", "channel", "category", "kind", "setting")},
                "cross_validated": round(float(score), 6),
                "final": round(float(final), 6),
            }
            for prompt, score, final in rows
        ],
    }
    (directory / SCORES).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
