"""What is written from a patch, and what of it travels beside the weights."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sasa_export.graph import LayerGraph
from sasa_export.models import Source
from sasa_export.probe.calibration import Calibration
from sasa_export.probe.figures import rounded
from sasa_export.probe.fit import Probe
from sasa_export.writers.cases import Case, write_cases

OWN = ("config.json", "model.safetensors.index.json", "README.md")
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
SCORES = "sasa-calibration.json"  # the figures, and the score of every calibration prompt


@dataclass(frozen=True)
class Patch:
    """All that a patched `directory` is made from; it is written beside its place, and shown there when verified.

    `sasa` is what its config.json holds under that name; `cases` are there where the model was loaded, computed
    in `dtype`. `device` is where it is verified, as transformers calls it.
    """

    directory: Path
    source: Source
    graph: LayerGraph
    sasa: dict[str, Any]
    probe: Probe
    calibration: Calibration | None
    cases: tuple[Case, ...]
    dtype: str
    device: str


def write_beside(patch: Patch, directory: Path) -> None:
    """What travels beside the weights: a copy of what the family's file names, such as processor and chat template, any
    licence, and scores and cases where there are some."""
    for pattern in (*patch.source.family.files, *LICENCES):
        for path in sorted(patch.source.directory.glob(pattern)):
            if path.is_file() and path.name not in OWN and not path.name.startswith("sasa-"):
                shutil.copyfile(path, directory / path.name)
    if patch.calibration is not None:
        _write_scores(patch.calibration, directory)
    if patch.cases:
        write_cases(patch.cases, directory, patch.dtype)


def _write_scores(calibration: Calibration, directory: Path) -> None:
    """`cross_validated` is P(unsafe) by a probe that saw nothing of the prompt's kind; `final` by the probe itself."""
    rows = zip(calibration.prompts, calibration.cross_validated, calibration.final, strict=True)
    data = {
        "threshold": calibration.probe.threshold,
        "max_false_positive_rate": calibration.max_false_positive_rate,
        "regularization": calibration.regularization,
        "figures": [rounded(figure) for figure in calibration.figures],
        "kinds": [rounded(figure) for figure in calibration.kinds],
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
