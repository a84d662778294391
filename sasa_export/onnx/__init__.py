"""Puts the gate into a decoder's ONNX graph. Any runtime loads the guarded graph, which judges each prompt itself.

The second lane is a clone of the graph's own blocks and shares every weight. The gate is the Guard of `runtime/`,
exported around placeholders and spliced in. A torch model is first exported as plain graphs.
"""

from pathlib import Path
from typing import Any

from sasa_export.models.contents import read_object

# Type of the weights -> the ending of the graphs' file names, as runtimes expect it.
SUFFIX = {"float32": "", "float16": "_fp16", "int8": "_int8", "int4": "_q4"}
NAMES = {"vision": "vision_encoder", "embedding": "embed_tokens", "decoder": "decoder_model_merged"}  # role -> file
MERGING = "embed_tokens_and_features"  # a second embedding graph, for onnxruntime-genai: it inserts pictures


def graphs_of(directory: Path) -> dict[str, Any]:
    """Return the `sasa` entry of a guarded directory's config.json, among it `graphs` (files by role) and `dtype`. The
    result is empty for a directory without graphs."""
    sasa = read_object(directory / "config.json").get("sasa")
    return sasa if isinstance(sasa, dict) and "graphs" in sasa else {}
