"""A torch module to an onnx-ir model: exported, simplified, its weights shared and its dimensions named."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import RewritePass, onnx_fusions
from onnxscript.rewriter.rules import common as rules
from torch import nn

from sasa_export.writers.onnx.decoder import Signature
from sasa_export.writers.onnx.passes.attention import trust_finite_masks
from sasa_export.writers.onnx.passes.weights import deduplicate, fold_transposes, folds

# Of onnxscript's default rules those that find something here. `slice_split_rule` is left out: it tries every pair of
# nodes, which takes most of an export's time.
RULES = (
    rules.cast_cast_rule, rules.no_op_cast_rule, rules.no_op_expand_rule, rules.no_op_transpose_rule,
    rules.reshape_reshape_rule, rules.squeeze_reshape_1d_rule, rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule, rules.collapse_slice_rule, rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule, rules.add_0_rule, rules.sub_0_rule, rules.mul_by_1_rule, rules.div_by_1_rule,
    rules.remove_optional_bias_from_conv_rule, rules.remove_optional_bias_from_gemm_rule,
    rules.cast_constant_of_shape_rule, rules.cast_constant_of_shape_without_value_rule,
    rules.no_op_dynamic_scatter_nd_rule, rules.no_op_static_scatter_nd_rule,
)  # fmt: skip
IR_VERSION = {18: 8, 20: 9, 21: 10, 22: 10, 23: 11, 24: 11}  # by opset


def convert(module: nn.Module, arguments: tuple[Any, ...], signature: Signature, *, opset: int) -> ir.Model:
    """Export `module` with every named dimension of `signature` free.

    The weights stay where they are: the returned model refers to the module's tensors, and no pass copies one.
    """
    variadic = any(item.kind is item.VAR_POSITIONAL for item in inspect.signature(module.forward).parameters.values())
    with _settings(opset), torch.no_grad():
        program = torch.export.export(
            module.eval(), arguments, dynamic_shapes=_free(arguments, signature, variadic=variadic), strict=False
        )
        exported = torch.onnx.export(program, dynamo=True, opset_version=opset, optimize=False, verbose=False)
        assert exported is not None
        model = exported.model
        _simplify(model)
        onnx_fusions.fuse(model)
    trust_finite_masks(model)
    fold_transposes(model)
    common.RemoveUnusedNodesPass()(model)
    deduplicate(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    _name_values(model, signature)
    model.ir_version = IR_VERSION[opset]
    return model


def _simplify(model: ir.Model) -> None:
    """Fold constants and apply onnxscript's rules, as its optimizer does."""
    for _ in range(2):
        fold_constants_ir(model, should_fold=folds)
        RewritePass(RULES)(model)
        common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.NameFixPass()(model)


def _free(arguments: tuple[Any, ...], signature: Signature, *, variadic: bool) -> Any:
    """The dynamic_shapes of torch.export: each dimension that the signature names is free."""
    shapes = iter(signature.inputs.values())

    def of(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            names = next(shapes)
            return {axis: torch.export.Dim.DYNAMIC for axis, name in enumerate(names) if isinstance(name, str)}
        if isinstance(value, dict):
            return {key: of(item) for key, item in value.items()}
        return type(value)(of(item) for item in value)

    found = tuple(of(argument) for argument in arguments)
    return (found,) if variadic else found


def _name_values(model: ir.Model, signature: Signature) -> None:
    """Give inputs and outputs their names, and dimensions their symbols, everywhere in the graph."""
    graph = model.graph
    symbols: dict[str, str] = {}
    for value, (name, shape) in zip(graph.inputs, signature.inputs.items(), strict=True):
        value.name = name
        for found, wanted in zip(value.shape or (), shape, strict=True):
            if isinstance(found, ir.SymbolicDim) and isinstance(wanted, str):
                symbols.setdefault(str(found.value), wanted)
        value.shape = ir.Shape(shape)
    for value, (name, shape) in zip(graph.outputs, signature.outputs.items(), strict=True):
        value.name = name
        value.shape = ir.Shape(shape)
    named = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for value in node.outputs:
            if value.shape is not None and id(value) not in named:
                value.shape = ir.Shape([_renamed(size, symbols) for size in value.shape])


def _renamed(size: int | ir.SymbolicDim, symbols: dict[str, str]) -> int | str | None:
    if isinstance(size, int):
        return size
    if size.value is None:
        return None
    return re.sub(r"\bs\d+\b", lambda match: symbols.get(match.group(), match.group()), str(size.value))


@contextlib.contextmanager
def _settings(opset: int) -> Iterator[None]:
    """What the exporter runs in; what it says of optional packages and of its own deprecations is silenced."""
    environment = {
        "TRANSFORMERS_DISABLE_TORCH_CHECK": "1",  # such a check has no equivalent in ONNX
        # Attention reads keys and values that several heads share as they are, and not repeated for each of them.
        "TRANSFORMERS_SDPA_FORCE_GQA": "1" if opset >= 23 else "0",
    }
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), patch.dict(os.environ, environment):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
