"""A patch, and the files that a patched directory holds beside the weights."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sasa_export.gate import GateSpec
from sasa_export.graph import LayerGraph
from sasa_export.models import Source
from sasa_export.probe import bundled
from sasa_export.probe.calibration import Calibration
from sasa_export.probe.figures import rounded
from sasa_export.probe.fit import Probe
from sasa_export.writers.cases import FOLDER, Case, write_cases

OWN = ("config.json", "model.safetensors.index.json", "README.md")
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
SCORES = "sasa-calibration.json"  # the figures, and the score of every calibration prompt
PROBES = f"{FOLDER}/probes.safetensors"  # for evaluations; vLLM loads all files one level up


@dataclass(frozen=True)
class Patch:
    """The parts of a patched `directory`. Its files are written beside it, and moved there after verification.

    `gate` is the entry `sasa` of its config.json. `cases` were computed in `dtype`; they are empty if the model was not
    loaded. `device` is the device of the verification, in the notation of transformers.
    """

    directory: Path
    source: Source
    graph: LayerGraph
    gate: GateSpec
    probe: Probe
    calibration: Calibration | None
    cases: tuple[Case, ...]
    dtype: str
    device: str


class Written(NamedTuple):
    """A written directory: its patch, and the SHA-256 of files that are known already, None for a linked file."""

    patch: Patch
    directory: Path
    digests: dict[str, str | None]


def write_beside(patch: Patch, directory: Path) -> None:
    """Write the files beside the weights: copies of the files that the family names, such as processor and chat
    template, any licence, and scores, cases and probes, if the patch has them."""
    for pattern in (*patch.source.family.files, *LICENCES):
        for path in sorted(patch.source.directory.glob(pattern)):
            if path.is_file() and path.name not in OWN and not path.name.startswith("sasa-"):
                shutil.copyfile(path, directory / path.name)
    if patch.cases:
        write_cases(patch.cases, directory, patch.dtype)
    if patch.calibration is not None:
        _write_scores(patch.calibration, directory)
        (directory / PROBES).parent.mkdir(exist_ok=True)
        origin = bundled.origin_of(patch.calibration.prompts, patch.gate.lane)
        bundled.write(patch.calibration.fitted, origin, directory / PROBES)


def _write_scores(calibration: Calibration, directory: Path) -> None:
    """Write P(unsafe) of each prompt: `cross_validated` by a probe without the prompt's kind, `final` by the probe."""
    rows = zip(calibration.prompts, calibration.cross_validated, calibration.final, strict=True)
    data = {
        "threshold": calibration.probe.threshold,
        "max_false_positive_rate": calibration.max_false_positive_rate,
        "regularization": calibration.fitted.regularization,
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
