"""The model card: what was done, what was measured, what it does not do. Its sentences stand in templates/."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sasa_export.graph import blocks_again, lane_tokens
from sasa_export.graph.diagram import mermaid
from sasa_export.probe.figures import verdict_on_projection
from sasa_export.report import Check
from sasa_export.runtime.version import TRIED
from sasa_export.writers.directory import Patch

TEMPLATES = Path(__file__).with_name("templates")


def write_card(
    patch: Patch, checks: Sequence[Check], verified: str, directory: Path, template: str = "card.md.j2", **values: Any
) -> None:
    """Write README.md into a patched directory.

    Args:
        patch: what was made.
        checks: what was found when it was verified, and `verified` how: the value of `--verify`.
        directory: where it was written.
        template: of the card, and `values` what it needs besides.
    """
    name = patch.source.name
    text = render(
        TEMPLATES,
        template,
        {"percent": "{:.1%}".format},
        name=name,
        base_model=patch.source.repository,
        commit=patch.source.commit,
        sasa=patch.sasa,
        blocks=len(patch.graph.of("block")),
        again=blocks_again(patch.sasa["graph"]),
        tokens=lane_tokens(patch.sasa["graph"]),
        diagram=mermaid(patch.graph),
        calibration=patch.calibration,
        projection=None if patch.calibration is None else verdict_on_projection(patch.calibration.figures),
        checks=checks,
        tried=" and ".join(TRIED),
        verified=verified,
        **values,
    )
    (directory / "README.md").write_text(text.strip() + "\n", encoding="utf-8")


def render(folder: Path, template: str, filters: dict[str, Any], **values: Any) -> str:
    """Text from a template. HTML templates (*.html.j2) escape what they are given; names that a template uses and
    nobody gave are errors."""
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment.get_template(template).render(**values)
