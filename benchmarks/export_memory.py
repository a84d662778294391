"""How much memory an ONNX export takes, on LLaVA-1.5-7B's exact shapes with random weights and few language blocks.

    python benchmarks/export_memory.py [--blocks 2,3,4] [--onnx-dtypes float16,float32,int4] [--out docs/onnx-memory.md]

For each number of blocks a model is written to disk, and the real command exports it, with a random probe and
`--verify files`, in a process of its own. Memory is that process's with all its children: what they hold
themselves (anonymous pages, the rest are files that the system maps and may drop at any time), and the
whole resident set with those files. A straight line through the measurements says what 32 blocks would take.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parents[1] / "tests"
WHOLE = 32  # blocks of LLaVA-1.5-7B
SAFETY, SEMANTIC = 13, 15  # its layers; scaled down where there are fewer blocks
EVERY = 0.02  # seconds between two looks at the memory
MB = 1e6


@dataclass(frozen=True)
class Measured:
    """One export: bytes of the weights on disk, of memory at the peaks, and of what was written; seconds."""

    blocks: int
    weights: int
    own: int
    resident: int
    start: int
    written: int
    seconds: float

    @property
    def row(self) -> str:
        return (
            f"| {self.blocks} | {self.weights / MB:,.0f} | {self.written / MB:,.0f} | {self.own / MB:,.0f} | "
            f"{self.own / self.written:.2f} | {self.resident / MB:,.0f} | {self.resident / self.written:.2f} | "
            f"{self.seconds:,.0f} |"
        )


def build(directory: Path, blocks: int, dtype: str) -> int:
    """Write a model of LLaVA-1.5-7B's shapes with `blocks` language blocks. Returns the bytes of its weights."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    from transformers.initialization import no_init_weights

    sys.path.insert(0, str(TESTS))
    import tiny

    # A tokenizer and a processor of the right kind; the model is never run.
    tiny.build("llava", directory)
    (directory / "model.safetensors").unlink()
    small = json.loads((directory / "config.json").read_text())
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=4096, intermediate_size=11008, num_hidden_layers=blocks, num_attention_heads=32,
            num_key_value_heads=32, vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5,
            bos_token_id=1, eos_token_id=2,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14, projection_dim=768,
        ),
        image_token_index=small["image_token_index"], image_seq_length=576, vision_feature_layer=-2,
    )  # fmt: skip
    kind = getattr(torch, dtype)
    with no_init_weights():
        model = LlavaForConditionalGeneration(config).to(kind)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02, generator=draw)
    model.save_pretrained(directory, max_shard_size="2GB")
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def tree(process: int) -> list[int]:
    """A process and all that it started."""
    found, waiting = [], [process]
    while waiting:
        number = waiting.pop()
        found.append(number)
        try:
            for task in Path(f"/proc/{number}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except OSError:  # it has ended
            continue
    return found


def memory(process: int) -> tuple[int, int]:
    """Bytes that a process and its children hold themselves, and their whole resident sets."""
    own = resident = 0
    for number in tree(process):
        try:
            lines = Path(f"/proc/{number}/status").read_text().splitlines()
        except OSError:
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
        own += sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0)
        resident += sizes.get("VmRSS", 0)
    return own, resident


def watched(command: list[str]) -> tuple[int, int, float]:
    """Run a command; the two peaks of its memory in bytes, and its seconds."""
    begun = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        own = resident = 0
        while process.poll() is None:
            now = memory(process.pid)
            own, resident = max(own, now[0]), max(resident, now[1])
            time.sleep(EVERY)
        if process.returncode:
            said.seek(0)
            sys.exit(said.read().decode(errors="replace")[-3000:])
    return own, resident, time.monotonic() - begun


def measure(blocks: int, dtype: str, onnx_dtype: str, place: Path) -> Measured:
    """Build, export, and clear away one model."""
    from safetensors.numpy import save_file

    source, out, probe = place / "source", place / "out", place / "probe.safetensors"
    source.mkdir()
    # In a process of its own, so that what building needs is not part of anything that is measured.
    command = [sys.executable, __file__, "--build", str(source), "--blocks", str(blocks), "--dtype", dtype]
    weights = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    weight = np.random.default_rng(0).normal(size=4096).astype(np.float32) / 100
    save_file({"sasa.probe.weight": weight, "sasa.probe.bias": np.zeros((), np.float32)}, probe)
    safety = min(SAFETY, max(0, blocks - 2) * SAFETY // (WHOLE - 2))
    options = {
        "model": source, "out": out, "probe": probe, "format": "onnx", "onnx-dtype": onnx_dtype, "verify": "files",
        "safety-layer": safety, "semantic-layer": safety + 1, "device": "cpu",
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    start = watched([sys.executable, "-c", "import onnxscript, sasa_export.pipeline, torch.onnx, transformers"])[1]
    own, resident, seconds = watched([sys.executable, "-m", "sasa_export", *words])
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    for path in (source, out):
        shutil.rmtree(path)
    return Measured(blocks, weights, own, resident, start, written, seconds)


def line(measured: list[Measured], peak: str) -> tuple[float, float]:
    """Slope and constant of the peak over the bytes of the graphs, by least squares."""
    x = np.array([item.written for item in measured], np.float64)
    y = np.array([getattr(item, peak) for item in measured], np.float64)
    slope, constant = np.polyfit(x, y, 1)
    return float(slope), float(constant)


def section(measured: list[Measured], dtype: str, onnx_dtype: str) -> str:
    """One type of graphs: a table, the line through it, and what that says of 32 blocks."""
    lines = [
        f"## {dtype} weights, {onnx_dtype} graphs\n",
        "| blocks | source, MB | graphs, MB | own memory, MB | over graphs | resident, MB | over graphs | s |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(item.row for item in measured),
        "",
    ]
    if len(measured) > 1:
        each = (measured[-1].written - measured[0].written) / (measured[-1].blocks - measured[0].blocks)
        whole = measured[0].written + each * (WHOLE - measured[0].blocks)
        for peak, name in (("own", "Own memory"), ("resident", "The resident set")):
            slope, constant = line(measured, peak)
            lines.append(
                f"{name}: {slope:.2f} times the graphs and {constant / MB:,.0f} MB more, by least squares. For {WHOLE} "
                f"blocks ({whole / MB:,.0f} MB of graphs) that line says {(slope * whole + constant) / MB:,.0f} MB, "
                f"{(slope * whole + constant) / whole:.2f} times the graphs: an extrapolation, not a measurement.\n"
            )
    return "\n".join(lines)


def page(sections: list[str], start: int) -> str:
    return (
        "# Memory of an ONNX export\n\n"
        f"Made by `python benchmarks/export_memory.py {' '.join(sys.argv[1:])}`.\n\n"
        "LLaVA-1.5-7B's exact shapes with random weights and few language blocks, exported by `sasa-export --format "
        "onnx --probe ... --verify files`; the peak of the whole command. *Own memory* is what the process holds "
        "itself. The *resident set* has the files in it too that the system maps, and drops whenever it needs the "
        "room: where the graphs have the type of the source, its weights stay in their file. *Graphs* is all that was "
        "written: the weights in their new type, and small files.\n\n"
        f"CPU ({platform.machine()}), torch {version('torch')}, transformers {version('transformers')}, onnx-ir "
        f"{version('onnx-ir')}. Importing everything, and no more, takes {start / MB:,.0f} MB.\n\n"
    ) + "\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory that an ONNX export takes.")
    parser.add_argument("--blocks", default="2,3,4", help="numbers of language blocks, with commas")
    parser.add_argument("--dtype", default="float16", help="of the model's weights")
    parser.add_argument("--onnx-dtypes", default="float16", help="of the graphs, with commas")
    parser.add_argument("--scratch", type=Path, default=None, help="where the models are written")
    parser.add_argument("--out", type=Path, default=None, help="a Markdown page")
    parser.add_argument("--build", type=Path, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.build is not None:
        print(build(given.build, int(given.blocks), given.dtype))
        return
    sections, start = [], 0
    for onnx_dtype in given.onnx_dtypes.split(","):
        measured = []
        for blocks in map(int, given.blocks.split(",")):
            with tempfile.TemporaryDirectory(dir=given.scratch) as place:
                measured.append(measure(blocks, given.dtype, onnx_dtype, Path(place)))
            print(onnx_dtype, measured[-1].row, flush=True)
        start = start or measured[0].start
        sections.append(section(measured, given.dtype, onnx_dtype))
    text = page(sections, start)
    print(text)
    if given.out is not None:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
