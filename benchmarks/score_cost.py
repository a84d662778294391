"""Whether `sasa-export score` gives the numbers of `model.judge`, and what it takes beside plain forward passes.

Both run over the same prompts of the built-in calibration set, in the same batches, from the data to the numbers: the
original only passes over each prompt. Graphs take one prompt at a time, and so does what they are compared with.

    python benchmarks/score_cost.py PATCHED GRAPHS [--out docs/results/score-cost.md]

PATCHED is a patched directory of safetensors, GRAPHS one of ONNX graphs, both made of the same model.
"""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path

import click
import numpy as np
import onnxruntime
import pandas as pd
import torch
from side_by_side import Row, Settings, markdown, write_page

from sasa_export.manifest import MANIFEST
from sasa_export.models import open_source
from sasa_export.models.load import load_model, load_processor, place
from sasa_export.prompts import builtin, for_model, load
from sasa_export.prompts.prompt import batches, encode
from sasa_export.prompts.shares import spaced
from sasa_export.report import quiet
from sasa_export.research.evaluate.models import load_patched
from sasa_export.research.score import Scored, score

BATCH = 16
SAME = ("prompts", "number", "largest difference from judge", "other verdicts")
SPEED = ("prompts", "score, a second", "plain passes, a second", "time: median (least to most)")


class OneThread(onnxruntime.SessionOptions):
    """Otherwise a thread for each core, which turns in circles while it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.intra_op_num_threads = 1


def write_prompts(count: dict[str, int], processor: object, folder: Path) -> dict[str, Path]:
    """Evenly spaced prompts of each channel that stand alone, as JSONL files with their pictures."""
    files = {}
    for channel, wanted in count.items():
        alone = [prompt for prompt in builtin() if prompt.channel == channel and not prompt.before]
        lines = []
        for number, prompt in enumerate(for_model(spaced(alone, wanted), processor)):
            lines.append({"prompt": prompt.prompt, "image": None})
            if prompt.image is not None:
                lines[-1]["image"] = f"{number}.png"
                prompt.image().save(folder / f"{number}.png")
        files[channel] = folder / f"{channel}.jsonl"
        files[channel].write_text("\n".join(map(json.dumps, lines)))
    return files


def plain_passes(model: str, data: Path, size: int) -> None:
    """Load the original and pass over every prompt once."""
    source = open_source(model)
    loaded, processor = load_model(source, dtype="float32", device="cpu"), load_processor(source)
    prompts = load(str(data), labelled=False)
    for rows in batches(prompts, size):
        loaded(**place(encode(processor, [prompts[row] for row in rows]), loaded), use_cache=False, logits_to_keep=1)


def judged(directory: Path, data: Path) -> np.ndarray:
    """P(unsafe) of each prompt alone, (prompts,), as a user of the patched model asks for it."""
    patched = load_patched(directory, "auto", "cpu")
    return np.array([patched.judge([prompt])[0] for prompt in load(str(data), labelled=False)])


def compared(directory: Path, made: str, data: Path, size: int, rounds: int) -> tuple[Scored, pd.DataFrame]:
    """What score finds, and the seconds of score and of plain passes, a row a round."""
    found: list[Scored] = []

    def scored() -> None:
        with tempfile.TemporaryDirectory() as folder:
            found.append(score(directory, str(data), Path(folder, "scored.jsonl"), batch_size=size, device="cpu"))

    work = {"score": scored, "plain": lambda: plain_passes(made, data, size)}
    # Nothing is warmed up: each includes its loading, and `judged` has run before.
    seconds = [{name: Settings().seconds(work[name]) for name in list(work)[:: (-1) ** turn]} for turn in range(rounds)]
    return found[-1], pd.DataFrame(seconds)


@click.command(help=__doc__.partition("\n")[0])
@click.argument("patched", type=click.Path(path_type=Path))
@click.argument("graphs", type=click.Path(path_type=Path))
@click.option("--texts", default=400, show_default=True)
@click.option("--pictures", default=100, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="How often each is timed.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the tables here, as Markdown.")
def main(patched: Path, graphs: Path, texts: int, pictures: int, rounds: int, out: Path | None) -> None:
    quiet()
    onnxruntime.SessionOptions = OneThread
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    made = json.loads((patched / MANIFEST).read_text())["options"]["model"]
    same: list[Row] = []
    speed: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_prompts({"text": texts, "picture": pictures}, load_processor(open_source(made)), Path(folder))
        for channel, data in files.items():
            wanted = judged(patched, data)  # (prompts,)
            for kind, directory, size in (("torch", patched, BATCH), ("ONNX", graphs, 1)):
                found, seconds = compared(directory, made, data, size, rounds)
                verdicts = (found.probabilities >= found.threshold) != (wanted >= found.threshold)  # (prompts,)
                difference = np.abs(found.probabilities - wanted).max()
                same.append([f"{channel}, {kind}", str(len(wanted)), f"{difference:.1e}", str(verdicts.sum())])
                speeds = [f"{len(wanted) / seconds[who].median():.2f}" for who in ("score", "plain")]
                ratio = seconds.score / seconds.plain
                spread = f"{ratio.median():.3f} ({ratio.min():.3f} to {ratio.max():.3f})"
                speed.append([f"{channel}, {kind}, {size} at a time", *speeds, spread])
    about = (
        f"{made}: float32, CPU ({platform.machine()}), one thread, the processor's time alone, loading included; "
        f"rounds in turn: {rounds}."
    )
    parts = [f"## The same numbers\n\n{markdown(SAME, same)}", f"## Speed\n\n{markdown(SPEED, speed)}"]
    click.echo("\n".join(parts))
    if out is not None:
        write_page("What score costs", about, parts, out)


if __name__ == "__main__":
    main()
