"""The directory of a guarded decoder: the files of the original, and a new graph beside its old weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from sasa_export.foreign.opened import GENAI, LAYERS, Graphs, variant
from sasa_export.models.contents import read_object
from sasa_export.writers.config import config_text
from sasa_export.writers.directory import Patch, write_beside
from sasa_export.writers.onnx.layout import SEAL
from sasa_export.writers.weights import bring, save_probe

JAVASCRIPT = {"": "fp32", "quantized": "q8"}  # what transformers.js calls types, where it is another word


def write_graphs(
    graphs: Graphs,
    guarded: ir.Model,
    added: int,
    patch: Patch,
    out: Path,
    *,
    link: bool,
    advance: Callable[[int], None],
) -> dict[str, str | None]:
    """Write graphs, weights, and the files beside them. Returns the digests of what was copied.

    Other variants of the decoder stay behind, since nothing guards them.

    Args: added: how many layers the ledger adds to the cache.
    """
    digests: dict[str, str | None] = {}
    write_beside(patch, out)
    for name in {*graphs.weights, *graphs.files.values()}:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if name != graphs.files["decoder"]:
            digests[name] = bring(graphs.source.directory / name, out / name, link=link, advance=advance)
    ir.save(guarded, out / graphs.files["decoder"])
    _write_configs(graphs, added, patch, out)
    save_probe(patch.probe, out / "sasa-probe.safetensors")
    return digests


def _write_configs(graphs: Graphs, added: int, patch: Patch, out: Path) -> None:
    """The configurations, in which the decoder has the ledger's layers of the cache too: runtimes count by them."""
    config = json.loads(json.dumps({**graphs.source.config, "quantization_config": SEAL, "sasa": patch.sasa}))
    text = config.get("text_config") or config
    text |= {name: text[name] + added for name in LAYERS if name in text}
    if text.get("layer_types"):
        text["layer_types"] += ["full_attention"] * added
    if "onnx/" in graphs.files["decoder"]:  # what transformers.js loads where nobody names a type
        types = {Path(file).stem.removesuffix(f"_{variant(file)}"): variant(file) for file in graphs.files.values()}
        types = {name: JAVASCRIPT.get(kind, kind) for name, kind in types.items()}
        config["transformers.js_config"] = {**config.get("transformers.js_config", {}), "dtype": types}
    (out / "config.json").write_text(config_text(config), encoding="utf-8")
    genai = read_object(out / GENAI)
    if genai:
        decoder = genai["model"]["decoder"]
        decoder["num_hidden_layers"] += added
        if "layer_types" in decoder:
            decoder["layer_types"] += ["full_attention"] * added
        (out / GENAI).write_text(config_text(genai), encoding="utf-8")
