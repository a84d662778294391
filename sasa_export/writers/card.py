"""Writes the model card: the patch, its measurements and its limits. The card's sentences are in templates/."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

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
        patch: the patch that the directory holds.
        checks, verified: the results of the verification, and the value of `--verify`.
        directory: the patched directory.
        template, values: the card's template, and further values that it uses.
    """
    name = patch.source.name
    text = render(
        TEMPLATES,
        template,
        {"percent": "{:.1%}".format},
        name=name,
        base_model=patch.source.repository,
        commit=patch.source.commit,
        gate=patch.gate,
        diagram=mermaid(patch.graph),
        calibration=patch.calibration,
        projection=None if patch.calibration is None else verdict_on_projection(patch.calibration.figures),
        checks=checks,
        tried=" and ".join(TRIED),
        vllm=patch.source.config.get("model_type") in patch.source.family.vllm,
        verified=verified,
        **values,
    )
    (directory / "README.md").write_text(text.strip() + "\n", encoding="utf-8")


def render(folder: Path, template: str, filters: dict[str, Any], **values: Any) -> str:
    """Return the text of a template with its values. HTML templates (*.html.j2) escape the values. A missing value is
    an error."""
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
