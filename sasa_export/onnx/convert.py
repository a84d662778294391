"""Converts a torch module to an onnx-ir model: simplified, with shared weights and named dimensions."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import RewritePass, onnx_fusions
from onnxscript.rewriter.rules import common as rules
from torch import nn
from torch.utils._pytree import tree_structure, tree_unflatten

from sasa_export.onnx.flat import Signature
from sasa_export.onnx.passes.attention import trust_finite_masks
from sasa_export.onnx.passes.names import name_nodes
from sasa_export.onnx.passes.weights import fold_transposes, folds

# The onnxscript default rules that match something here. `slice_split_rule` is left out: it tries every pair of nodes,
# and would take most of an export's time.
RULES = (
    rules.cast_cast_rule, rules.no_op_cast_rule, rules.no_op_expand_rule, rules.no_op_transpose_rule,
    rules.reshape_reshape_rule, rules.squeeze_reshape_1d_rule, rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule, rules.collapse_slice_rule, rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule, rules.add_0_rule, rules.sub_0_rule, rules.mul_by_1_rule, rules.div_by_1_rule,
    rules.remove_optional_bias_from_conv_rule, rules.remove_optional_bias_from_gemm_rule,
    rules.cast_constant_of_shape_rule, rules.cast_constant_of_shape_without_value_rule,
    rules.no_op_dynamic_scatter_nd_rule, rules.no_op_static_scatter_nd_rule,
)  # fmt: skip
IR_VERSION = {18: 8, 20: 9, 21: 10, 22: 10, 23: 11, 24: 11}  # opset -> IR version


def convert(
    module: nn.Module, arguments: tuple[Any, ...], signature: Signature, names: dict[str, str], *, opset: int
) -> ir.Model:
    """Return `module` as an ONNX model. Every named dimension of `signature` is dynamic. `names` are for `name_nodes`.

    The model refers to the module's tensors. No pass copies a weight.
    """
    named = [
        {axis: name for axis, name in enumerate(shape) if isinstance(name, str)} for shape in signature.inputs.values()
    ]
    axes = [dict.fromkeys(names, torch.export.Dim.DYNAMIC) for names in named]
    free = tree_unflatten(axes, tree_structure(arguments))  # nested like the arguments
    with _settings(opset), torch.no_grad():
        program = torch.export.export(module.eval(), arguments, dynamic_shapes=free, strict=False)
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=opset, optimize=False, verbose=False, dynamic_shapes=named
        )
        assert exported is not None
        model = exported.model
        _simplify(model)
        onnx_fusions.fuse(model)
    trust_finite_masks(model)
    fold_transposes(model)
    common.RemoveUnusedNodesPass()(model)
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    values = (*model.graph.inputs, *model.graph.outputs)
    for value, (name, shape) in zip(values, (*signature.inputs.items(), *signature.outputs.items()), strict=True):
        value.name, value.shape = name, ir.Shape(shape)
    model.ir_version = IR_VERSION[opset]
    name_nodes(model, names)
    return model


def _simplify(model: ir.Model) -> None:
    """Fold constants and apply onnxscript's rules, as its optimizer does."""
    for _ in range(2):
        fold_constants_ir(model, should_fold=folds)
        RewritePass(RULES)(model)
        common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.NameFixPass()(model)


@contextlib.contextmanager
def _settings(opset: int) -> Iterator[None]:
    """Set the exporter's environment variables. Silence its notes on optional packages and its own deprecations."""
    wanted = {
        "TRANSFORMERS_DISABLE_TORCH_CHECK": "1",  # such a check has no equivalent in ONNX
        # Attention reads keys and values shared by several heads directly, without repeating them for each head.
        "TRANSFORMERS_SDPA_FORCE_GQA": "1" if opset >= 23 else "0",
    }
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with mock.patch.dict(os.environ, wanted), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
