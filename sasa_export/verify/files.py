"""Checks of a patched directory that need no model in memory."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np

from sasa_export.calibrate.given import PROBE_BIAS, PROBE_WEIGHT
from sasa_export.emit.manifest import MANIFEST, digest
from sasa_export.errors import OpenError
from sasa_export.open import read_config
from sasa_export.open.shards import read_shards
from sasa_export.runtime import MODELING_FILE
from sasa_export.verify.check import Check


def check_files(directory: Path) -> list[Check]:
    """Configuration, modeling file, shards and probe."""
    return [_config(directory), _modeling(directory), *_weights(directory)]


def check_manifest(directory: Path) -> Check:
    """Every file is the one whose SHA-256 the manifest holds, and there is no other."""
    name = "files are those that were exported"
    path = directory / MANIFEST
    if not path.exists():
        return Check(name, False, f"{MANIFEST} is missing")
    try:
        listed = dict(json.loads(path.read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError):
        return Check(name, False, f"{MANIFEST} is damaged")
    present = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()} - {MANIFEST}
    wrong = sorted(present ^ set(listed))
    wrong += sorted(file for file in present & set(listed) if digest(directory / file) != listed[file])
    if wrong:
        return Check(name, False, f"{len(wrong)} differ: {', '.join(wrong[:3])}")
    return Check(name, True, f"{len(listed)} of {len(listed)} by SHA-256")


def _config(directory: Path) -> Check:
    from sasa_export.runtime.modeling_sasa import SEAL, check_settings

    name = "config.json is guarded and sealed"
    config = read_config(directory)
    try:
        check_settings(config.get("sasa"))
    except (ValueError, KeyError, TypeError) as error:
        return Check(name, False, str(error))
    seals = [key for key in ("text_config", "vision_config") if SEAL in config.get(key, {}).get("id2label", {})]
    passed = str(config.get("model_type")).startswith("sasa_") and len(seals) == 2
    return Check(name, passed, f"model_type {config.get('model_type')}, {len(seals)} of 2 seals")


def _modeling(directory: Path) -> Check:
    name = "the modeling file stands alone"
    path = directory / MODELING_FILE
    if not path.exists():
        return Check(name, False, f"{MODELING_FILE} is missing")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return Check(name, False, f"{MODELING_FILE} is no Python file")
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {module.split(".")[0] for module in imported}
    foreign = sorted(roots & {"sasa_export", "sklearn", "numpy", ""})
    return Check(name, not foreign, f"imports {', '.join(foreign)}" if foreign else "torch and transformers alone")


def _weights(directory: Path) -> list[Check]:
    from safetensors.numpy import load_file

    name = "shards and index agree"
    try:
        shards = read_shards(directory)
    except OpenError as error:
        return [Check(name, False, str(error))]
    keys = {key: shard for shard in shards for key in shard.keys}
    checks = [Check(name, True, f"{len(keys)} tensors in {len(shards)} shards")]
    if PROBE_WEIGHT not in keys or PROBE_BIAS not in keys:
        return [*checks, Check("the probe is usable", False, "sasa.probe is missing")]
    tensors = load_file(keys[PROBE_WEIGHT].path)
    weight, bias = tensors[PROBE_WEIGHT], tensors[PROBE_BIAS]
    usable = bool(np.isfinite(weight).all() and np.isfinite(bias).all() and weight.any())
    float32 = weight.dtype == np.float32 and bias.dtype == np.float32
    detail = f"{weight.dtype} {weight.shape}, {'finite' if usable else 'zero, NaN or infinite'}"
    return [*checks, Check("the probe is usable", usable and float32, detail)]
