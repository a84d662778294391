"""Checks of a patched directory that need no model in memory, and of graphs as files."""

import hashlib
import json
from pathlib import Path
from typing import Any

import transformers

from sasa_export.errors import CalibrationError, OpenError
from sasa_export.manifest import MANIFEST, digest
from sasa_export.models import read_config
from sasa_export.models.contents import outside, read_object
from sasa_export.models.shards import read_shards
from sasa_export.probe.given import PROBE_BIAS, PROBE_WEIGHT, read_probe
from sasa_export.report import Check
from sasa_export.runtime.bundle import MODELING_FILE, modeling_source
from sasa_export.runtime.settings import SEAL, check_settings
from sasa_export.writers.config import config_text
from sasa_export.writers.onnx import DECODER, GRAPHS, MERGING, SUFFIX


def check_files(directory: Path) -> list[Check]:
    """Configuration, shards and probe."""
    return [_config(directory), *_weights(directory)]


def check_manifest(directory: Path) -> Check:
    """Every file is the one whose SHA-256 the manifest holds, in the directory itself, and there is no other."""
    name = "files are those that were exported"
    path = directory / MANIFEST
    if not path.exists():
        said = f"not checked, since {MANIFEST} is missing, as it is where a model was saved again"
        return Check(name, None, said)
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        listed, edited = dict(told["files"]), ""
        present = _present(directory)
        wrong = [*sorted(present ^ set(listed)), *outside(directory)]
        wrong += sorted(file for file in present & set(listed) if _digest(directory / file) != listed[file])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return Check(name, False, f"{MANIFEST} is damaged")
    wrong = list(dict.fromkeys(wrong))
    if "config.json" in wrong and _unedited(directory / "config.json", told.get("operator")) == listed["config.json"]:
        wrong.remove("config.json")
        edited = ", with settings as the operator changed them"
    if wrong:
        return Check(name, False, f"{len(wrong)} differ: {', '.join(wrong[:3])}")
    return Check(name, True, f"{len(listed)} of {len(listed)} by SHA-256{edited}")


def _unedited(path: Path, exported: dict[str, Any] | None) -> str | None:
    """The SHA-256 of config.json with what an operator may edit set back to what was `exported`."""
    config = read_config(path.parent)
    if exported is None or not isinstance(config.get("sasa"), dict):
        return None
    config["sasa"] |= exported
    return hashlib.sha256(config_text(config).encode()).hexdigest()


def _present(directory: Path) -> set[str]:
    """All files but the manifest, and but what hubs and git keep for themselves under names with a leading dot."""
    names = {path.relative_to(directory) for path in directory.rglob("*") if not path.is_dir()}
    return {name.as_posix() for name in names if not name.parts[0].startswith(".")} - {MANIFEST}


def _digest(path: Path) -> str | None:
    try:
        return digest(path) if path.is_file() else None  # a pipe would be read for ever
    except OSError:
        return None


def _config(directory: Path) -> Check:
    name = "config.json is guarded and sealed"
    config = read_config(directory)
    try:
        check_settings(config.get("sasa"))
        seals = sum(SEAL in config[part].get("id2label", {}) for part in ("text_config", "vision_config"))
    except Exception as error:  # an entry can be damaged in as many ways as it has values
        return Check(name, False, str(error) or type(error).__name__)
    passed = str(config.get("model_type")).startswith("sasa_") and seals == 2
    return Check(name, passed, f"model_type {config.get('model_type')}, {seals} of 2 seals")


def is_ours(directory: Path) -> bool:
    """Whether the directory's code is, byte for byte, what is written for its class, and config.json names no other."""
    config = read_config(directory)
    name, *_ = config.get("architectures") or [""]
    stock: Any = getattr(transformers, str(name).removeprefix("Sasa"), None)
    named = config["auto_map"].values() if isinstance(config.get("auto_map"), dict) else [None]
    code = [path.relative_to(directory).as_posix() for path in directory.rglob("*.py")]
    alone = code == [MODELING_FILE] and {str(value).partition(".")[0] for value in named} == {Path(MODELING_FILE).stem}
    if not alone or not hasattr(stock, "config_class"):
        return False
    return (directory / MODELING_FILE).read_bytes() == modeling_source(stock.config_class, stock).encode()


def _weights(directory: Path) -> list[Check]:
    name, probe = "shards and index agree", "the probe is usable"
    try:
        shards = read_shards(directory)
    except OpenError as error:
        return [Check(name, False, str(error))]
    agree = Check(name, True, f"{sum(len(shard.keys) for shard in shards)} tensors in {len(shards)} shards")
    shard = next((shard for shard in shards if {PROBE_WEIGHT, PROBE_BIAS} <= set(shard.keys)), None)
    if shard is None:
        return [agree, Check(probe, False, "sasa.probe is missing")]
    try:
        weight = read_probe(shard.path, None).weight  # (features,)
    except CalibrationError as error:
        return [agree, Check(probe, False, str(error))]
    types = {kind for key, kind in zip(shard.keys, shard.types, strict=True) if key in (PROBE_WEIGHT, PROBE_BIAS)}
    detail = f"{'/'.join(sorted(types))} {weight.shape}, finite".replace("F32", "float32")
    return [agree, Check(probe, types == {"F32"}, detail)]


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
