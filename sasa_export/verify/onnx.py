"""Checks of an ONNX directory that need no run: the graphs as files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sasa_export.models.contents import read_object
from sasa_export.report import Check
from sasa_export.writers.onnx import DECODER, GRAPHS, MERGING, SUFFIX

REPEATED = 1024  # bytes: indices may repeat, since they are constants of the graph and no weights


def foreign_of(directory: Path) -> dict[str, Any]:
    """The gate's settings of a directory of graphs that others exported; empty where it is none."""
    sasa = read_object(directory / "config.json").get("sasa")
    return sasa if isinstance(sasa, dict) and "graphs" in sasa else {}


def dtypes_of(directory: Path) -> list[str]:
    """The types of a directory's decoders, by their names: one as exported, none where it is no ONNX directory."""
    if foreign := foreign_of(directory):
        return [foreign["dtype"]]
    return [dtype for dtype, suffix in SUFFIX.items() if (directory / "onnx" / f"{DECODER}{suffix}.onnx").is_file()]


def dtype_of(directory: Path) -> str | None:
    """The type of a directory's graphs; None where it is no ONNX directory."""
    return next(iter(dtypes_of(directory)), None)


def check_graphs(directory: Path, dtype: str) -> list[Check]:
    """The graph checker, and weights stored twice; of graphs that others exported, whether they hold the gate."""
    import onnx_ir

    if foreign := foreign_of(directory):
        return [_spliced(onnx_ir.load(directory / foreign["graphs"]["decoder"]), foreign)]
    paths = [directory / "onnx" / f"{name}{SUFFIX[dtype]}.onnx" for name in GRAPHS]
    merging = directory / "onnx" / f"{MERGING}{SUFFIX[dtype]}.onnx"
    valid = _valid([*paths, merging] if merging.is_file() else paths)
    if not valid.passed:
        return [valid]
    return [valid, _stored_once([onnx_ir.load(path) for path in paths])]


def _spliced(decoder: Any, sasa: dict[str, Any]) -> Check:
    """The gate in a graph that others exported: its kernels need not be those that a checker knows."""
    layers = {value.name.split(".")[1] for value in decoder.graph.inputs if value.name.startswith("past")}
    blocks = sum(node["op"] == "block" for node in sasa["graph"])
    branches = [node.name for node in decoder.graph if node.op_type == "If" and node.name.startswith("/sasa/")]
    judges = any(value.name == "unsafe_probability" for value in decoder.graph.outputs)
    detail = f"{len(branches)} branch, {len(layers) - blocks} layers of the cache beside those of {blocks} blocks"
    return Check("the decoder holds the gate", judges and len(branches) == 1 and len(layers) > blocks, detail)


def _valid(paths: list[Path]) -> Check:
    import onnx

    name = "the graph checker passes"
    for path in paths:
        try:
            onnx.checker.check_model(path, full_check=True)
        except Exception as error:  # it raises errors of its own, of protobuf and of the file system
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            return Check(name, False, f"{path.name}: {type(error).__name__}: {said[:200]}")
    return Check(name, True, f"{len(paths)} of {len(paths)} graphs")


def _stored_once(models: list[Any]) -> Check:
    stored = unique = 0
    for model in models:
        seen: set[tuple[str, tuple[int, ...], bytes]] = set()
        for tensor in _tensors(model):
            key = (str(tensor.dtype), tuple(tensor.shape.numpy()), hashlib.sha256(tensor.tobytes()).digest())
            stored += tensor.nbytes
            unique += 0 if key in seen else tensor.nbytes
            seen.add(key)
            if hasattr(tensor, "release"):
                tensor.release()  # the mapping of a file beside the graph, which counts as memory
    detail = f"{stored:,} bytes, {unique:,} of them unique"
    return Check("no weight is stored twice", stored - unique < REPEATED, detail)


def _tensors(model: Any) -> Iterator[Any]:
    """All that a model stores, in subgraphs and Constant nodes too."""
    for graph in model.graphs():
        yield from (value.const_value for value in graph.initializers.values() if value.const_value is not None)
        for node in graph:
            if node.op_type == "Constant" and "value" in node.attributes:
                yield node.attributes["value"].value
