"""What the files of the families name in Python and in sasa-vllm is there."""

import ast
from pathlib import Path

import pytest
import transformers
from torch import nn

from sasa_export.models.family import families, onnx_recipes
from sasa_export.onnx.recipes import tower_class

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("model_type", onnx_recipes())
def test_the_tower_of_a_recipe(model_type: str) -> None:
    kind = tower_class(onnx_recipes()[model_type])
    assert issubclass(kind, nn.Module) and callable(kind.inputs)


def test_sasa_vllm_serves_what_the_files_say() -> None:
    """It is a package of its own, which cannot read the files where it runs."""
    tree = ast.parse((ROOT / "serving/src/sasa_vllm/config.py").read_text(encoding="utf-8"))
    (value,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node).startswith("FAMILIES = ")
    )
    served = {getattr(transformers, f"{name}Config").model_type for name in ast.literal_eval(value)}
    assert served == {model_type for family in families().values() for model_type in family.vllm}
