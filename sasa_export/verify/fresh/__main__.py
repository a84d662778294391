"""Loads a written directory as a user would, and prints its answers to its cases and to further prompts.

Usage: python fresh/ MODULE DIRECTORY OPTIONS DEVICE TOKENS PROMPTS

MODULE is a file beside this one (`torch_model`, `onnx_model`, `mlx_model`), whose `Model` loads the directory with
OPTIONS, a JSON object. PROMPTS is a folder with prompts.json and pictures. These prompts are judged, not answered. The
last line printed is a JSON object: `about` describes the model, `cases` and `judged` have one entry for each prompt.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import logging


def main(module: str, directory: Path, options: str, device: str, count: int, prompts: Path) -> dict[str, Any]:
    logging.set_verbosity_error()
    model = importlib.import_module(module).Model(directory, options, device)
    cases = []
    folder = directory / "sasa-verify"
    written = folder / "cases.json"
    for case in json.loads(written.read_text(encoding="utf-8"))["cases"] if written.exists() else ():
        probability, first, tokens = model.answer(read(model, case, folder), count)
        logits = [float(first[token]) for token, _ in case["logits"]]
        finite = bool(np.isfinite(first).all())
        cases.append({"unsafe_probability": probability, "tokens": tokens, "logits": logits, "finite": finite})
    entries = json.loads((prompts / "prompts.json").read_text(encoding="utf-8"))
    judged = [model.judge(read(model, entry, prompts)) for entry in entries]
    return {"about": model.about, "cases": cases, "judged": judged}


def read(model: Any, entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the model's inputs for a conversation, with its picture from `folder` if it has one."""
    for part in (part for message in entry["messages"] for part in message["content"]):
        if part["type"] == "image":
            part["image"] = Image.open(folder / entry["image"]).convert("RGB")
    return dict(
        model.processor.apply_chat_template(
            [entry["messages"]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"return_tensors": model.tensors},
        )
    )


if __name__ == "__main__":
    module, directory, options, device, count, prompts = sys.argv[1:]
    print(json.dumps(main(module, Path(directory), options, device, int(count), Path(prompts))))
