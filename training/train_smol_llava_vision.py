"""Train the vision tower and projector of smol-llava to turn pictures of text into token embeddings.

    python training/train_smol_llava_vision.py MODEL_DIRECTORY --work FOLDER [--init FILE] [--steps N]

MODEL_DIRECTORY is what `sasa_export.models.smol_llava.build` wrote; its language model is frozen and gives the
embeddings. Training is seeded, page by page, and goes on from the last checkpoint in FOLDER when started
again. The finished tower is FOLDER/vision.safetensors. Needs the extra `training` and, for variety, Debian's
fonts. Where other work shares the cores, OMP_WAIT_POLICY=PASSIVE makes a step several times cheaper.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from corpus import (
    BLANK,
    MARKS,
    Pages,
    Tokens,
    capitalised,
    debian_fonts,
    held_out_words,
    photographs_in,
    request_words,
    vocabulary,
)
from measure_smol_llava import REQUESTS, reading, request_pages, sample_requests
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from tower import Tower, read

from sasa_export.models.smol_llava import VISION

WARM_UP = 100  # steps
FULL_VARIETY = 0.25  # the share of training after which pages vary as much as the renderer's
BLANKS_KEPT = 0.3  # of the blank cells, which are many and easy
BLANK_WEIGHT = 0.3
OTHER_TOKENS = 2048  # drawn anew each step, to be told apart from the vocabulary's own
KEEP_EVERY, EXAMINE_EVERY = 100, 500  # steps


class Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches of pages from step `first` on; a step's pages depend on its number alone."""

    def __init__(self, pages: Pages, first: int, steps: int, batch: int, variety: float) -> None:
        self.pages, self.first, self.steps, self.batch, self.variety = pages, first, steps, batch, variety

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(self.first, self.steps):
            reached = min(1.0, step / max(1.0, FULL_VARIETY * self.steps))
            variety = self.variety + (1.0 - self.variety) * reached
            made = [self.pages.page(step * self.batch + i, variety) for i in range(self.batch)]
            yield (
                torch.stack([torch.from_numpy(pixels) for pixels, _ in made]),
                torch.stack([torch.from_numpy(wanted) for _, wanted in made]),
            )


def blank_embedding(tower: Tower, pages: Pages) -> Tensor:
    """The vector, (hidden,), that `tower` gives to blank cells of plain pages."""
    pages = replace(pages, photographs=())
    made = [pages.page(-1 - number, 0.0) for number in range(24)]
    features = read(tower, torch.stack([torch.from_numpy(pixels) for pixels, _ in made]))
    mask = torch.stack([torch.from_numpy(wanted) for _, wanted in made]) == BLANK
    return features[mask].mean(0)


def cell_loss(
    features: Tensor,
    wanted: Tensor,
    table: Tensor,
    directions: Tensor,
    blank: Tensor,
    candidates: Tensor,
    late: float,
) -> tuple[Tensor, float]:
    """Loss over the cells of a batch, and the share of words read right among the candidates.

    features (batch, 64, hidden); wanted (batch, 64); table (tokens, hidden); directions: the table at length
    1, in bfloat16; candidates: sorted token ids; late: 0 at the start of training, where telling words apart
    counts most, to 1, where closeness does.
    """
    is_word = wanted != BLANK
    seen, ids = features[is_word].float(), wanted[is_word]  # (words, hidden), (words,)
    truth = table[ids]
    cosines = functional.normalize(seen, dim=-1).bfloat16() @ directions[candidates].T  # (words, candidates)
    labels = torch.searchsorted(candidates, ids)
    telling = functional.cross_entropy(20 * cosines.float(), labels)
    distance = (seen - truth).square().sum(-1).mean()
    turned = 1 - functional.cosine_similarity(seen, truth, dim=-1).mean()
    kept = ~is_word & (torch.rand(wanted.shape) < BLANKS_KEPT)
    empty = features[kept].float()
    empty_loss = (
        (empty - blank).square().sum(-1).mean() + 1 - functional.cosine_similarity(empty, blank[None], dim=-1).mean()
    )
    loss = (1.2 - 0.6 * late) * telling + (0.05 + 0.4 * late) * distance + (1 + late) * turned
    return loss + BLANK_WEIGHT * empty_loss, (cosines.argmax(-1) == labels).float().mean().item()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, a level stretch to 15 % of the training, then a cosine down to a hundredth."""
    if step < WARM_UP:
        return peak * (step + 1) / WARM_UP
    past = max(0.0, (step / steps - 0.15) / 0.85)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * past)))


def save_checkpoint(file: Path, state: dict[str, Any]) -> None:
    beside = file.with_name(file.name + ".part")
    torch.save(state, beside)
    os.replace(beside, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory that sasa_export.models.smol_llava.build wrote")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and the result")
    parser.add_argument("--init", type=Path, default=VISION, help="tower to start from")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=12, help="pages a step")
    parser.add_argument("--rate", type=float, default=6e-4, help="highest learning rate")
    parser.add_argument("--late", type=float, default=1.0, help="weight of closeness at the start, 0 to 1")
    parser.add_argument("--variety", type=float, default=0.5, help="variety of looks at the start, 0 to 1")
    parser.add_argument("--common", type=int, default=5000, help="how many common words to learn")
    parser.add_argument("--photographs", type=Path, help="folder of pictures in which there is nothing to read")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stop", type=int, help="stop at this step, to go on another time")
    options = parser.parse_args()

    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    tokens = Tokens(AutoProcessor.from_pretrained(options.model).tokenizer)
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32)
    table = model.get_input_embeddings().weight.detach()[:49152].clone()  # (tokens, hidden)
    directions = functional.normalize(table, dim=-1).bfloat16()
    del model

    requests = request_words(REQUESTS)
    words = vocabulary(options.common, requests, held_out_words(options.common, requests))
    training_fonts, other_fonts = debian_fonts()
    photographs = photographs_in(options.photographs) if options.photographs else ()
    pages = Pages(words, tokens, training_fonts, options.seed, photographs)
    forms = {form for word in words.words for form in (word, capitalised(word))}
    written = {form + mark for form in forms for mark in ("", *MARKS)}
    vocabulary_ids = torch.tensor(sorted({token for word in written for token in tokens(word)}))
    for what, found in {"words": words.words, "tokens": vocabulary_ids, "fonts": training_fonts}.items():
        print(len(found), what, flush=True)
    print(len(photographs), "photographs", flush=True)

    tower = Tower().load(options.init)
    optimiser = torch.optim.AdamW(tower.parameters(), lr=options.rate, weight_decay=0.02, fused=True)
    checkpoint, first = options.work / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        tower.load_state_dict(state["tower"])
        optimiser.load_state_dict(state["optimiser"])
        first, blank = state["step"], state["blank"]
    else:
        blank = blank_embedding(tower, pages)
    harmful, harmless = sample_requests(60)
    examination = request_pages(harmful + harmless, tokens)
    other_examination = request_pages(harmful + harmless, tokens, other_fonts)

    def keep(step: int) -> None:
        state = {"tower": tower.state_dict(), "optimiser": optimiser.state_dict()}
        save_checkpoint(checkpoint, state | {"step": step, "blank": blank})
        tower.save(options.work / "vision.safetensors")

    last = min(options.steps, options.stop or options.steps)
    book = Batches(pages, first, options.steps, options.batch, options.variety)
    accuracy, started = 0.0, time.monotonic()
    for step, (pixels, wanted) in enumerate(DataLoader(book, batch_size=None, num_workers=1), start=first):
        if step >= last:
            break
        torch.manual_seed(options.seed * 1_000_003 + step)
        late = options.late + (1 - options.late) * min(1.0, step / options.steps / 0.35)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.rate)
        others = torch.randint(0, len(table), (OTHER_TOKENS,))
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(pixels)
        candidates = torch.cat([vocabulary_ids, others]).unique()
        loss, right = cell_loss(features, wanted, table, directions, blank, candidates, late)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimiser.step()
        accuracy += 0.02 * (right - accuracy)
        if step % 50 == 0:
            speed = (time.monotonic() - started) / (step - first + 1)
            print(f"{step} loss {loss.item():.3f} read {accuracy:.3f} ({speed:.2f} s a step)", flush=True)
        if (step + 1) % KEEP_EVERY == 0:
            keep(step + 1)
        if (step + 1) % EXAMINE_EVERY == 0:
            tower.eval()
            for name, (shown, truth) in (("requests", examination), ("other fonts", other_examination)):
                marks = reading(tower, table, shown, truth)
                print(f"{step + 1} {name}: {marks['accuracy']:.3f} cosine {marks['cosine']:.3f}", flush=True)
            tower.train()
    keep(last)


if __name__ == "__main__":
    main()
