"""Puts the gate into an ONNX directory: a new decoder graph beside the old weights, and matching configurations.

A torch model is exported as plain graphs first. These get the gate in the same way as graphs that others exported.
"""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from sasa_export.errors import EmitError, reworded
from sasa_export.models import read_config
from sasa_export.models.contents import read_object
from sasa_export.models.load import load_model, load_processor
from sasa_export.onnx.decoder import Decoder
from sasa_export.onnx.guard import Witness
from sasa_export.onnx.opened import GENAI, LAYERS, Graphs, variant
from sasa_export.onnx.plain import write_plain
from sasa_export.onnx.quantize import BITS
from sasa_export.onnx.splice import guarded_decoder
from sasa_export.report import Silent
from sasa_export.writers.config import config_text
from sasa_export.writers.directory import Patch, write_beside
from sasa_export.writers.weights import save_probe

JAVASCRIPT = {"": "fp32", "quantized": "q8"}  # ending of the file name -> type in transformers.js
# ONNX runtimes ignore this entry, and every from_pretrained fails on it. Otherwise, weights put beside the graphs would
# load as a plain model without the gate.
SEAL = {"sasa": "ONNX graphs guarded by SASA: load them with an ONNX runtime. These are no weights for transformers."}


@reworded(
    EmitError,
    "the graphs could not be made ({reason}). The model may hold what the exporter cannot turn into ONNX, or memory "
    "ran out. Try another --onnx-dtype or --opset, or give --format safetensors.",
)
def export(patch: Patch, out: Path, *, opset: int, dtype: str, report: Silent) -> Patch:
    """Write the directory `out`, except the card and the manifest, which need the verification's results. Return the
    patch with the settings in `out`'s config.json.

    `opset` and `dtype` are those of `write_plain`. Graphs of every type keep the probe that was calibrated in torch:
    graphs run one prompt at a time, while one calibration in torch serves all types and both formats, and verification
    counts the verdicts that a type changes. The gate's arithmetic is always float32.

    Raises EmitError for any error of the exporter or of its rewriting rules.
    """
    write_beside(patch, out)
    report.step("onnx", "loading the model")
    model = load_model(patch.source, dtype="float32" if dtype in BITS else dtype, device="cpu")
    processor = load_processor(patch.source)
    files = write_plain(model, processor, patch.source, out, opset=opset, dtype=dtype, report=report)
    # The rounding of quantized products exceeds the witness's tolerance.
    witness = None if dtype in BITS else Witness.of(model, processor, list(map(dict, patch.gate.graph)))
    _forget(model)
    report.step("onnx", "putting the gate in")
    decoder = Decoder(Graphs(replace(patch.source, directory=out, config=read_config(out)), files, ()))
    gate = replace(patch.gate, graphs=files, lengths=decoder.lengths, dtype=dtype, opset=opset)
    patch = replace(patch, gate=gate)
    if patch.cases and gate.lane.pair:  # this takes as much memory as verification
        report.step("", decoder.check_lane(gate.lane))
    put_gate(decoder, guarded_decoder(decoder, gate, patch.probe, witness), patch, out)
    return patch


def _forget(model: Any) -> None:
    """Free a model's weights before anything else is loaded.

    The exporter's rewriting rules live as long as the process, and hold a reference to the last graph.
    """
    for parameter in model.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    gc.collect()


def put_gate(decoder: Decoder, guarded: ir.Model, patch: Patch, out: Path) -> None:
    """Write a guarded decoder, the probe, and the configurations to `out`, which already holds the weights. The
    configurations count the ledger's cache layers as layers of the decoder, since runtimes rely on this number."""
    files = decoder.graphs.files
    ir.save(guarded, out / files["decoder"])
    save_probe(patch.probe, out / "sasa-probe.safetensors")
    layers = {str(value.name).split(".")[1] for value in guarded.graph.inputs if str(value.name).startswith("past")}
    added = len(layers) - decoder.sizes.blocks
    config = json.loads(json.dumps({**decoder.source.config, "sasa": patch.gate.to_json()}))
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if part:
            part["quantization_config"] = SEAL
    for text in (config, config.get("text_config") or {}):
        _count(text, added)
    if "onnx/" in files["decoder"]:  # the types that transformers.js loads by default
        types = {Path(file).stem.removesuffix(f"_{variant(file)}"): variant(file) for file in files.values()}
        types = {name: JAVASCRIPT.get(kind, kind) for name, kind in types.items()}
        config["transformers.js_config"] = {**config.get("transformers.js_config", {}), "dtype": types}
    (out / "config.json").write_text(config_text(config), encoding="utf-8")
    if genai := read_object(out / GENAI):
        _count(genai["model"]["decoder"], added)
        (out / GENAI).write_text(config_text(genai), encoding="utf-8")


def _count(text: dict[str, Any], added: int) -> None:
    """Add layers of keys and values to a configuration's number of layers."""
    text |= {name: text[name] + added for name in LAYERS if name in text}
    if text.get("layer_types"):
        text["layer_types"] += ["full_attention"] * added
