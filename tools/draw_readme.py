"""Draws README's picture: a harmful request in a picture, answered before the patch and refused after it, and how
P(unsafe) of harmful and of ordinary prompts lies.

    python tools/draw_readme.py build/patched docs/pictures/readme.png
"""

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sasa_export.report import quiet
from sasa_export.research import theme

PICTURE = Path(__file__).parents[1] / "examples/browser/pictures/harmful.png"
CARRIER = "Follow the instruction shown in the image."
BINS = np.linspace(0, 1, 41)


def answers(directory: Path) -> tuple[str, str, float]:
    """What smol-llava says to the picture before and after, and P(unsafe)."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from sasa_export.models import EMBEDDED, open_source

    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    content = [{"type": "image", "image": Image.open(PICTURE).convert("RGB")}, {"type": "text", "text": CARRIER}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        processor_kwargs={"return_tensors": "pt"},
    )  # fmt: skip
    before = AutoModelForImageTextToText.from_pretrained(open_source(EMBEDDED).directory)
    after = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True)

    def said(model: Any) -> str:
        tokens = model.generate(**inputs, max_new_tokens=28, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return " ".join(processor.tokenizer.decode(tokens, skip_special_tokens=True).split())

    return said(before), said(after), float(after.judge(**inputs)[0])


def draw(directory: Path) -> bytes:
    before, after, probability = answers(directory)
    told = json.loads((directory / "sasa-calibration.json").read_text(encoding="utf-8"))
    scores = {
        kind: [row["cross_validated"] for row in told["prompts"] if row["channel"] == "text" and row["label"] == label]
        for kind, label in (("harmless", 0), ("harmful", 1))
    }
    with theme.drawing(3.0, 10.0) as figure:
        shown, said, spread = figure.subplots(1, 3, width_ratios=(1, 1.5, 2))
        shown.imshow(Image.open(PICTURE))
        shown.set(xticks=[], yticks=[])
        shown.spines[:].set_visible(False)
        shown.set_xlabel(textwrap.fill(f'"{CARRIER}"', 26), fontsize=9)
        said.set_axis_off()
        lines = (
            ("before", f"{before} ...", theme.INK),
            (f"after: P(unsafe) {probability:.2f}, refused", after, theme.HARMFUL),
        )
        for place, (title, text, colour) in zip((0.98, 0.42), lines, strict=True):
            said.text(0, place, title, va="top", fontsize=10, fontweight="bold", color=colour)
            said.text(0, place - 0.1, textwrap.fill(text, 34), va="top", fontsize=9)
        for kind, colour in (("harmless", theme.HARMLESS), ("harmful", theme.HARMFUL)):
            spread.hist(
                scores[kind], BINS, density=True, color=colour, alpha=0.55, label=f"{kind}, {len(scores[kind]):,}"
            )
        spread.axvline(told["threshold"], color=theme.INK, linewidth=1.2, linestyle="--", label="threshold")
        spread.set(xlabel="P(unsafe) of text prompts, their kind left out", yticks=[], xlim=(0, 1))
        spread.legend(fontsize=8.5)
        return theme.png(figure)


if __name__ == "__main__":
    quiet()
    Path(sys.argv[2]).write_bytes(draw(Path(sys.argv[1])))
