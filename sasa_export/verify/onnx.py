"""Checks of an ONNX directory that need no run: the graphs as files."""

from pathlib import Path
from typing import Any

from sasa_export.models.contents import read_object
from sasa_export.report import Check
from sasa_export.writers.onnx import DECODER, GRAPHS, MERGING, SUFFIX


def foreign_of(directory: Path) -> dict[str, Any]:
    """The gate's settings of a directory of graphs that others exported; empty where it is none."""
    sasa = read_object(directory / "config.json").get("sasa")
    return sasa if isinstance(sasa, dict) and "graphs" in sasa else {}


def dtype_of(directory: Path) -> str | None:
    """The type of a directory's graphs, by the decoder's name; None where it is no ONNX directory."""
    if foreign := foreign_of(directory):
        return str(foreign["dtype"])
    there = (dtype for dtype, end in SUFFIX.items() if (directory / "onnx" / f"{DECODER}{end}.onnx").is_file())
    return next(there, None)


def check_graphs(directory: Path, dtype: str) -> Check:
    """The graph checker; of graphs that others exported, whether they hold the gate."""
    import onnx

    if foreign := foreign_of(directory):
        return _spliced(directory / foreign["graphs"]["decoder"], foreign)
    name = "the graph checker passes"
    paths = [directory / "onnx" / f"{graph}{SUFFIX[dtype]}.onnx" for graph in (*GRAPHS, MERGING)]
    paths = [path for path in paths if MERGING not in path.name or path.is_file()]
    for path in paths:
        try:
            onnx.checker.check_model(path, full_check=True)
        except Exception as error:  # it raises errors of its own, of protobuf and of the file system
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            return Check(name, False, f"{path.name}: {type(error).__name__}: {said[:200]}")
    return Check(name, True, f"{len(paths)} of {len(paths)} graphs")


def _spliced(path: Path, sasa: dict[str, Any]) -> Check:
    """The gate in a graph that others exported: its kernels need not be those that a checker knows."""
    import onnx_ir

    name = "the decoder holds the gate"
    try:
        graph: Any = onnx_ir.load(path).graph
    except Exception as error:  # as above
        return Check(name, False, f"{path.name} cannot be read ({type(error).__name__})")
    layers = {value.name.split(".")[1] for value in graph.inputs if value.name.startswith("past")}
    blocks = sum(node["op"] == "block" for node in sasa["graph"])
    branches = [node.name for node in graph if node.op_type == "If" and node.name.startswith("/sasa/")]
    judges = any(value.name == "unsafe_probability" for value in graph.outputs)
    detail = f"{len(branches)} branch, {len(layers) - blocks} layers of the cache beside those of {blocks} blocks"
    return Check(name, judges and len(branches) == 1 and len(layers) > blocks, detail)
