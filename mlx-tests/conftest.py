"""Tests of patched directories in stock mlx-vlm, without torch: `reference.py` has made them in another environment."""

import base64
import contextlib
import functools
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx_vlm import load
from mlx_vlm.generate import generate_step
from mlx_vlm.generate.ar import BatchGenerator
from mlx_vlm.utils import prepare_inputs, should_add_special_tokens

MADE = Path(os.environ.get("SASA_MLX_MADE", Path(__file__).parents[1] / "build" / "mlx"))


@functools.cache
def made(name: str) -> SimpleNamespace:
    """A patched model in mlx-vlm, and what transformers says to its prompts."""
    folder = MADE / name
    model, processor = load(str(folder / "patched"))
    prompts = json.loads((folder / "reference.json").read_text())
    sasa = model.language_model._sasa
    return SimpleNamespace(folder=folder, model=model, processor=processor, prompts=prompts, sasa=sasa)


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
        if token == model.language_model._sasa["refusal_token_ids"][-1]:
            break
    return said


def embedded(model: Any, ids: list[int]) -> dict[str, Any]:
    """A text as the language model is handed it beside its ids."""
    given = model.get_input_embeddings(mx.array([ids]), None).to_dict()
    return {name: value for name, value in given.items() if value is not None}


def batch(loaded: Any, prompts: list[list[int]], count: int, processors: Any = None, **options: Any) -> list[list[int]]:
    """Answers of up to `count` tokens to texts in batches, by mlx-vlm's BatchGenerator and its `options`."""
    generator = BatchGenerator(
        loaded.model.language_model, loaded.processor, stop_tokens={loaded.sasa["refusal_token_ids"][-1]}, **options
    )
    more = {"logits_processors": [processors] * len(prompts)} if processors else {}
    given = [embedded(loaded.model, ids) for ids in prompts]
    said: dict[int, list[int]] = {row: [] for row in generator.insert(prompts, count, prompt_kwargs=given, **more)}
    while generator.has_work:
        for response in generator.next()[1]:
            said[response.uid].append(response.token)
    return list(said.values())


@contextlib.contextmanager
def serving(model: str, *options: str) -> Iterator[Callable[..., str]]:
    """mlx-vlm's server in a process of its own. The value asks for 16 tokens on words, and a picture if any."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "mlx_vlm.server", "--model", model, "--port", url.rpartition(":")[2], *options]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(words: str, picture: str | None = None, **more: Any) -> str:
        content: list[dict[str, Any]] = [{"type": "text", "text": words}]
        if picture:
            shown = base64.b64encode(Path(picture).read_bytes()).decode()
            content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{shown}"}})
        said = [{"role": "user", "content": content}]
        body = {"model": model, "max_tokens": 16, "temperature": 0, "messages": said, **more}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=600) as answer:
            return str(json.load(answer)["choices"][0]["message"]["content"])

    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            time.sleep(0.5)
        yield ask
    finally:
        server.terminate()
        server.wait()


@pytest.fixture()
def verdicts(caplog: pytest.LogCaptureFixture) -> Any:
    """What the logger `sasa` was told, when it is called; `clear` forgets it."""
    caplog.set_level(logging.INFO, logger="sasa")
    found: Any = lambda: [record for record in caplog.records if record.name == "sasa"]  # noqa: E731
    found.clear = caplog.clear
    return found


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
