"""What travels inside a patched directory, and how its family's classes are named there."""

from __future__ import annotations

from pathlib import Path

MODELING_FILE = "modeling_sasa.py"

FOOTER = """

# ---------------------------------------------------------------------------------------------- the family

from transformers import AutoConfig  # noqa: E402
from {config_module} import {config_class}  # noqa: E402
from {model_module} import {model_class}  # noqa: E402


class Sasa{config_class}(GuardedConfig, {config_class}):
    model_type = "{model_type}"


class Sasa{model_class}(GuardedModel, {model_class}):
    config_class = Sasa{config_class}


# So that AutoProcessor and AutoTokenizer, which look at config.json too, know it and need not ask.
AutoConfig.register("{model_type}", Sasa{config_class}, exist_ok=True)
"""


def guarded_type(model_type: str) -> str:
    """The model_type of its own that a patched model has."""
    return f"sasa_{model_type}"


def modeling_source(config: type, model: type) -> str:
    """The modeling file of one family: the runtime, and the classes built on the family's stock classes."""
    core = (Path(__file__).parent / MODELING_FILE).read_text(encoding="utf-8")
    return core + FOOTER.format(
        config_module=config.__module__,
        config_class=config.__name__,
        model_module=model.__module__,
        model_class=model.__name__,
        model_type=guarded_type(config.model_type),  # type: ignore[attr-defined]
    )
