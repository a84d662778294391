"""Checks of a patched directory's files, which need no model in memory."""

import hashlib
import json
from pathlib import Path
from typing import Any

import transformers

from sasa_export.errors import CalibrationError, OpenError
from sasa_export.manifest import MANIFEST, digest
from sasa_export.models import read_config
from sasa_export.models.contents import outside
from sasa_export.models.shards import read_shards
from sasa_export.onnx import MERGING, graphs_of
from sasa_export.probe.file import PROBE_BIAS, PROBE_WEIGHT, read_probe
from sasa_export.report import Check
from sasa_export.runtime.bundle import MLX_FILE, MODELING_FILE, mlx_source, modeling_source
from sasa_export.runtime.settings import SEAL, check_settings
from sasa_export.writers.config import config_text


def check_files(directory: Path) -> list[Check]:
    """Return the checks of configuration, shards and probe."""
    return [_config(directory), *_weights(directory)]


def check_manifest(directory: Path) -> Check:
    """Check that the directory holds exactly the manifest's files, by SHA-256, and has no links out of it."""
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
        wrong += sorted(file for file in present & set(listed) if digest(directory / file) != listed[file])
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
    """Return the SHA-256 of config.json with the operator's settings set back to the `exported` ones, if possible."""
    config = read_config(path.parent)
    if exported is None or not isinstance(config.get("sasa"), dict):
        return None
    config["sasa"] |= exported
    return hashlib.sha256(config_text(config).encode()).hexdigest()


def _present(directory: Path) -> set[str]:
    """Return all files except the manifest, and except those of hubs and git, whose names have a leading dot."""
    names = {path.relative_to(directory) for path in directory.rglob("*") if path.is_file()}
    return {name.as_posix() for name in names if not name.parts[0].startswith(".")} - {MANIFEST}


def _config(directory: Path) -> Check:
    name = "config.json is guarded and sealed"
    config = read_config(directory)
    try:
        check_settings(config.get("sasa"))
        seals = sum(SEAL in config[part].get("id2label", {}) for part in ("text_config", "vision_config"))
    except Exception as error:  # a damaged entry may raise any error
        return Check(name, False, str(error) or type(error).__name__)
    passed = str(config.get("model_type")).startswith("sasa_") and seals == 2
    return Check(name, passed, f"model_type {config.get('model_type')}, {seals} of 2 seals")


def is_ours(directory: Path) -> bool:
    """Return whether the directory's code is exactly the code for its class, and config.json names no other code."""
    config = read_config(directory)
    name, *_ = config.get("architectures") or [""]
    stock: Any = getattr(transformers, str(name).removeprefix("Sasa"), None)
    named = config["auto_map"].values() if isinstance(config.get("auto_map"), dict) else [None]
    code = [path.relative_to(directory).as_posix() for path in directory.rglob("*.py")]
    alone = {str(value).partition(".")[0] for value in named} == {Path(MODELING_FILE).stem}
    if not alone or not hasattr(stock, "config_class"):
        return False
    ours = {MODELING_FILE: modeling_source(stock.config_class, stock)}
    if "model_file" in config:
        ours[MLX_FILE] = mlx_source()
    return (
        config.get("model_file", MLX_FILE) == MLX_FILE
        and {name: (directory / name).read_text(encoding="utf-8", errors="replace") for name in code} == ours
    )


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


def check_graphs(directory: Path) -> list[Check]:
    """Return the check that the decoder holds the gate. Our own exports also run through the graph checker; graphs of
    others may use kernels that the checker does not know."""
    told = graphs_of(directory)
    decoder = directory / told["graphs"]["decoder"]
    checks = [_holds_gate(decoder, sum(node["op"] == "block" for node in told.get("graph", ())))]
    if "opset" in told:
        files = [*(directory / file for file in told["graphs"].values()), *decoder.parent.glob(f"{MERGING}*.onnx")]
        checks.append(_checker(files))
    return checks


def _checker(paths: list[Path]) -> Check:
    import onnx

    name = "the graph checker passes"
    for path in paths:
        try:
            onnx.checker.check_model(path, full_check=True)
        except Exception as error:  # from the checker, protobuf or the file system
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            return Check(name, False, f"{path.name}: {type(error).__name__}: {said[:200]}")
    return Check(name, True, f"{len(paths)} of {len(paths)} graphs")


def _holds_gate(path: Path, blocks: int) -> Check:
    import onnx_ir

    name = "the decoder holds the gate"
    try:
        graph: Any = onnx_ir.load(path).graph
    except Exception as error:  # as in `_checker`
        return Check(name, False, f"{path.name} cannot be read ({type(error).__name__})")
    layers = {value.name.split(".")[1] for value in graph.inputs if value.name.startswith("past")}
    branches = [node.name for node in graph if node.op_type == "If" and node.name.startswith("/sasa/")]
    judges = any(value.name == "unsafe_probability" for value in graph.outputs)
    detail = f"{len(branches)} branch, {len(layers) - blocks} layers of the cache beside those of {blocks} blocks"
    return Check(name, judges and len(branches) == 1 and len(layers) > blocks, detail)
