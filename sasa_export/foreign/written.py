"""The directory of a guarded decoder: the files of the original, and a new graph beside its old weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sasa_export.foreign.guard import Interface
from sasa_export.foreign.opened import GENAI, LAYERS, Graphs, variant
from sasa_export.models.contents import read_object
from sasa_export.writers.cases import write_cases
from sasa_export.writers.config import config_text
from sasa_export.writers.directory import Patch
from sasa_export.writers.files import LICENCES
from sasa_export.writers.onnx.layout import SEAL
from sasa_export.writers.scores import write_scores
from sasa_export.writers.weights import bring, save_probe

PROBE = "sasa-probe.safetensors"  # what --probe takes
COPIED = ("*.json", "*.jinja", "*.txt", "*.model", *LICENCES)
# How transformers.js calls the types that file names end with, where it is another word.
JAVASCRIPT = {"": "fp32", "quantized": "q8"}


def write_graphs(
    graphs: Graphs,
    guarded: ir.Model,
    interface: Interface,
    patch: Patch,
    out: Path,
    *,
    link: bool,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, str]:
    """Write graphs, weights, and the files beside them. Returns the digests of what was copied or linked.

    Other variants of the decoder stay behind, since nothing guards them.
    """
    directory, digests = graphs.source.directory, {}
    for pattern in COPIED:
        for path in sorted(directory.glob(pattern)):
            if path.is_file() and not path.name.startswith("sasa-"):
                shutil.copyfile(path, out / path.name)
    for name in (*graphs.weights, *(file for role, file in graphs.files.items() if role != "decoder")):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        digests[name] = bring(directory / name, out / name, link=link, advance=advance)
    (out / graphs.files["decoder"]).parent.mkdir(parents=True, exist_ok=True)
    ir.save(guarded, out / graphs.files["decoder"])
    config = _config(graphs, interface)
    (out / "config.json").write_text(config_text({**config, "sasa": patch.sasa}), encoding="utf-8")
    genai = read_object(directory / GENAI)
    if genai:
        genai["model"]["decoder"]["num_hidden_layers"] += interface.ledger.layers
        (out / GENAI).write_text(json.dumps(genai, indent=4) + "\n", encoding="utf-8")
    save_probe(patch.probe, out / PROBE)
    if patch.calibration is not None:
        write_scores(patch.calibration, out)
    if patch.cases:
        write_cases(patch.cases, out, patch.dtype)
    return digests


def _config(graphs: Graphs, interface: Interface) -> dict[str, Any]:
    """config.json, except that its decoder has the ledger's layers of the cache too, by which runtimes count them."""
    config, added = json.loads(json.dumps(graphs.source.config)), interface.ledger.layers
    text = config.get("text_config") or config
    for name in LAYERS:
        if name in text:
            text[name] += added
    if text.get("layer_types"):
        text["layer_types"] += ["full_attention"] * added
    config["quantization_config"] = SEAL
    if "onnx/" in graphs.files["decoder"]:  # what transformers.js loads where nobody names a type
        marks = {Path(file).stem.removesuffix(f"_{variant(file)}"): variant(file) for file in graphs.files.values()}
        types = {name: JAVASCRIPT.get(mark, mark) for name, mark in marks.items()}
        config["transformers.js_config"] = {**config.get("transformers.js_config", {}), "dtype": types}
    return config
