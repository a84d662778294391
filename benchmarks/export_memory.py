"""How much memory an ONNX export takes, on LLaVA-1.5-7B's exact shapes with random weights and few language blocks.

    python benchmarks/export_memory.py [--blocks 2,3,4] [--onnx-dtypes float16,int4] [--out docs/results/onnx-memory.md]

For each number of blocks a model is written to disk, and the real command exports it, with a random probe and
`--verify files`, in a process of its own. A straight line through the measurements says what 32 blocks would take.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
from process import run_process
from side_by_side import markdown, write_page, write_probe
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.initialization import no_init_weights

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import tiny

WHOLE = 32  # blocks of LLaVA-1.5-7B
HIDDEN = 4096
SIDE, PATCH = 336, 14  # pixels of a picture and of a patch
SAFETY = 13  # its layer; scaled down where there are fewer blocks
MB = 1e6
START = "import onnxscript, sasa_export.pipeline, torch.onnx, transformers"
COLUMNS = (
    "blocks", "source, MB", "graphs, MB", "own memory, MB", "over graphs", "resident, MB", "over graphs", "s",
)  # fmt: skip
ABOUT = """\
LLaVA-1.5-7B's exact shapes with random weights and few language blocks, exported by `sasa-export --format onnx --probe
... --verify files`; the peak of the whole command. *Own memory* is what the process and its children hold themselves.
The *resident set* has the files in it too that the system maps, and drops whenever it needs the memory: where the
graphs have the type of the source, its weights stay in their file. *Graphs* is all that was written."""


def build(directory: Path, blocks: int, dtype: str) -> None:
    """Write a model of LLaVA-1.5-7B's shapes with `blocks` language blocks. It is never run."""
    tiny.build("llava", directory)  # a tokenizer and a processor of the right kind
    (directory / "model.safetensors").unlink()
    processor: Any = AutoProcessor.from_pretrained(directory)
    processor.image_processor.size = processor.image_processor.crop_size = {"height": SIDE, "width": SIDE}
    processor.patch_size = PATCH
    processor.save_pretrained(directory)
    small = json.loads((directory / "config.json").read_text())
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=11008, num_hidden_layers=blocks, num_attention_heads=32,
            num_key_value_heads=32, vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5,
            bos_token_id=1, eos_token_id=2,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=SIDE,
            patch_size=PATCH, projection_dim=768,
        ),
        image_token_index=small["image_token_index"], image_seq_length=576, vision_feature_layer=-2,
    )  # fmt: skip
    with no_init_weights():
        model = LlavaForConditionalGeneration(config).to(getattr(torch, dtype))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02, generator=draw)
    model.save_pretrained(directory, max_shard_size="2GB")


def measure(blocks: int, dtype: str, onnx_dtype: str, place: Path) -> dict[str, float]:
    """Build and export one model: bytes of its weights, of what was written and of memory at the peaks; seconds."""
    source, out = place / "source", place / "out"
    build(source, blocks, dtype)
    safety = min(SAFETY, max(0, blocks - 2) * SAFETY // (WHOLE - 2))
    options = {
        "model": source, "out": out, "probe": write_probe(place / "probe.safetensors", 3 * HIDDEN), "format": "onnx",
        "onnx-dtype": onnx_dtype, "verify": "files", "safety-layer": safety, "semantic-layer": safety + 1,
        "device": "cpu",
    }  # fmt: skip
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    found = run_process([sys.executable, "-m", "sasa_export", *arguments])
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"blocks": blocks, "weights": weights, "written": written, **vars(found)}


def section(measured: pd.DataFrame, heading: str) -> str:
    """One type of graphs: a table, the line through it by least squares, and what that says of 32 blocks."""
    rows = [
        [
            f"{row.blocks:.0f}", *(f"{size / MB:,.0f}" for size in (row.weights, row.written)), f"{row.own / MB:,.0f}",
            f"{row.own / row.written:.2f}", f"{row.resident / MB:,.0f}", f"{row.resident / row.written:.2f}",
            f"{row.seconds:,.0f}",
        ]
        for row in measured.itertuples()
    ]  # fmt: skip
    parts = [f"## {heading}\n", markdown(COLUMNS, rows)]
    if len(measured) > 1:
        whole = np.polyval(np.polyfit(measured.blocks, measured.written, 1), WHOLE)
        lines = []
        for peak, name in (("own", "own memory"), ("resident", "resident set")):
            slope, constant = np.polyfit(measured.written, measured[peak], 1)
            said = slope * whole + constant
            numbers = (f"{slope:.2f}", f"{constant / MB:,.0f}", f"{said / MB:,.0f}", f"{said / whole:.2f}")
            lines.append([name, *numbers])
        columns = ("by least squares", "times the graphs", "and MB more", f"{WHOLE} blocks, MB", "over graphs")
        parts += [markdown(columns, lines), f"{WHOLE} blocks, {whole / MB:,.0f} MB of graphs, were not measured.\n"]
    return "\n".join(parts)


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--blocks", default="2,3,4", show_default=True, help="Numbers of language blocks, with commas.")
@click.option("--dtype", default="float16", show_default=True, help="Of the model's weights.")
@click.option("--onnx-dtypes", default="float16", show_default=True, help="Of the graphs, with commas.")
@click.option("--scratch", type=click.Path(path_type=Path), help="Where the models are written.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write a page of Markdown here.")
def main(blocks: str, dtype: str, onnx_dtypes: str, scratch: Path | None, out: Path | None) -> None:
    start = run_process([sys.executable, "-c", START]).resident
    parts = []
    for onnx_dtype in onnx_dtypes.split(","):
        measured = []
        for count in map(int, blocks.split(",")):
            with tempfile.TemporaryDirectory(dir=scratch) as place:
                measured.append(measure(count, dtype, onnx_dtype, Path(place)))
        parts.append(section(pd.DataFrame(measured), f"{dtype} weights, {onnx_dtype} graphs"))
        click.echo(parts[-1])
    about = (
        f"{ABOUT}\n\nCPU ({platform.machine()}), "
        f"onnx-ir {version('onnx-ir')}. Importing everything, and no more, takes {start / MB:,.0f} MB."
    )
    if out is not None:
        write_page("Memory of an ONNX export", about, parts, out)


if __name__ == "__main__":
    main()
