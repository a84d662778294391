"""Tests of patched directories in stock mlx-vlm, without torch: `reference.py` has made them in another environment."""

import functools
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import mlx.core as mx
import pytest
from mlx_vlm import load
from mlx_vlm.generate import generate_step
from mlx_vlm.utils import prepare_inputs, should_add_special_tokens

MADE = Path(os.environ.get("SASA_MLX_MADE", Path(__file__).parents[1] / "build" / "mlx"))
FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@functools.cache
def made(name: str) -> SimpleNamespace:
    """A patched model in mlx-vlm, and what transformers says to its prompts."""
    folder = MADE / name
    model, processor = load(str(folder / "patched"))
    prompts = json.loads((folder / "reference.json").read_text())
    return SimpleNamespace(folder=folder, model=model, processor=processor, prompts=prompts, sasa=sasa_of(model))


def sasa_of(model: Any) -> dict[str, Any]:
    return model.language_model._sasa


def inputs(given: Any, prompt: dict[str, Any]) -> dict[str, Any]:
    """A prompt as mlx-vlm's Python interface takes it."""
    if prompt["text"] is None:
        return {"input_ids": mx.array([prompt["ids"]]), "pixel_values": None, "mask": None}
    picture = prompt["picture"] and [str(given.folder / prompt["picture"])]
    special = should_add_special_tokens(given.model.config.model_type, given.processor)
    found = prepare_inputs(given.processor, images=picture, prompts=prompt["text"], add_special_tokens=special)
    return {"mask": found.pop("attention_mask", None), "pixel_values": found.pop("pixel_values", None), **found}


def say(model: Any, fed: dict[str, Any], count: int = 16, **options: Any) -> list[int]:
    """The answer to a prompt, up to its end."""
    fed, said = dict(fed), []
    ids, pixels, mask = (fed.pop(name) for name in ("input_ids", "pixel_values", "mask"))
    for token, _ in generate_step(ids, model, pixels, mask, max_tokens=count, **fed, **options):
        said.append(int(token))
        if token == sasa_of(model)["refusal_token_ids"][-1]:
            break
    return said


class Verdicts(logging.Handler):
    """What the logger `sasa` was told since `clear`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def emit(self, record: Any) -> None:
        self.found.append(record)

    def last(self) -> float:
        return self.found[-1].probability


@pytest.fixture()
def verdicts() -> Iterator[Verdicts]:
    handler, logger = Verdicts(), logging.getLogger("sasa")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)


@pytest.fixture()
def copied(tmp_path: Path) -> Path:
    """The patched llava, to be changed."""
    return Path(shutil.copytree(MADE / "llava" / "patched", tmp_path / "patched"))


def edit(directory: Path, **changes: Any) -> Path:
    """Change config.sasa; what is not of it is changed by a dictionary `config`."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config |= changes.pop("config", {})
    config["sasa"] |= changes
    path.write_text(json.dumps(config))
    return directory
