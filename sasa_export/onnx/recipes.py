"""The ONNX recipe of a model type, as its family's file under graphs/ gives it, and the vision tower it names."""

import importlib
from typing import Any

from sasa_export.errors import EmitError
from sasa_export.models.family import OnnxRecipe, onnx_recipes


def recipe_of(model_type: str) -> OnnxRecipe:
    """Return the recipe of a stock model type. EmitError lists the supported types."""
    recipes = onnx_recipes()
    if model_type not in recipes:
        raise EmitError(
            f"model type {model_type!r} has no ONNX recipe. Supported: {', '.join(sorted(recipes))}. "
            "Export it with --format safetensors, or add a recipe to its file under graphs/."
        )
    return recipes[model_type]


def check_tower(model_type: str, tower: str) -> None:
    """Raise EmitError where the recipe of a stock model type does not support this type of vision tower."""
    supported = recipe_of(model_type).vision_types
    if supported and tower not in supported:
        raise EmitError(
            f"the ONNX recipe of model type {model_type!r} is for a vision tower of type {' or '.join(supported)}, and "
            f"this model has one of type {tower}. Export it with --format safetensors."
        )


def tower_class(recipe: OnnxRecipe) -> Any:
    """Return the module class behind vision_encoder.onnx. It is made of a stock model, and its static `inputs(model)`
    returns the graph's inputs with their dimensions, and example arguments."""
    module, _, name = recipe.tower.partition(".")
    return getattr(importlib.import_module(f"sasa_export.onnx.towers.{module}"), name)
