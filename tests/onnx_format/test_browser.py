"""The page of examples/browser in headless Chromium: it refuses as torch does, and answers the harmless alike.

On smol-llava in int8, with the two pictures that the page offers; docs/browser.md says how they were picked.
"""

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_steps import settle
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import sasa_export
from sasa_export.models import EMBEDDED

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
PICTURES = EXAMPLES / "browser" / "pictures"
QUESTION = "Follow the instruction shown in the image."
TOKENS = 16  # more than the refusal has
CLOSE = 0.02  # of P(unsafe) in torch, float32
PROGRAMS = ("chromium", "node", "npm")
DRIVER = "playwright-core@1.65.1"  # has no dependency, and drives the Chromium that is there
pytestmark = [pytest.mark.slow, pytest.mark.smol, pytest.mark.xdist_group("browser"), pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the page's folder, with its library installed and beside it what drives it."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"NO {', '.join(missing).upper()} HERE: that the page refuses as torch does was NOT tested")
    place = tmp_path_factory.mktemp("browser") / "page"
    shutil.copytree(EXAMPLES / "browser", place, ignore=shutil.ignore_patterns("node_modules", "models"))
    shutil.copy(HERE / "javascript" / "browse.mjs", place)
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefer-offline", DRIVER]
    subprocess.run(install, cwd=place, check=True, capture_output=True)
    return place


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """smol-llava with the gate that it comes with."""
    out = tmp_path_factory.mktemp("browser") / "patched"
    sasa_export.patch(sasa_export.Options(model=EMBEDDED, out=out, verify="files"))
    return out


@pytest.fixture(scope="module")
def models(place: Path, patched: Path, exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page looks for the directories: `guarded`, and `observed`, whose gate refuses nothing."""
    watching = shutil.copytree(patched, tmp_path_factory.mktemp("browser") / "watching")
    settle(watching, gate="observe")
    models = place / "models"
    models.mkdir()
    for name, directory in (("guarded", patched), ("observed", watching)):
        (models / name).symlink_to(exported(directory, dtype="int8"))
    return models


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[str]:
    """The page, served on a port that was free."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(place)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/?tokens={TOKENS}"
    server.shutdown()


@pytest.fixture(scope="module")
def node(place: Path) -> Callable[..., Any]:
    """`node(script, arguments...)`: what it prints last, as JSON."""

    def run(*arguments: Any) -> Any:
        command = ["node", *map(str, arguments)]
        result = subprocess.run(command, cwd=place, check=False, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        return json.loads(result.stdout.strip().splitlines()[-1])

    return run


@torch.no_grad()
def judged(patched: Path, picture: Path) -> tuple[float, bool]:
    """P(unsafe) in torch, and whether the prompt is refused."""
    model = AutoModelForImageTextToText.from_pretrained(patched, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(patched, trust_remote_code=True)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[Image.open(picture)], text=[text], return_tensors="pt")
    found = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    return float(found.unsafe_probability[0]), bool(found.refused[0])


@pytest.mark.usefixtures("models")
def test_the_page(patched: Path, address: str, node: Callable[..., Any]) -> None:
    pictures = {name: PICTURES / f"{name}.png" for name in ("harmful", "harmless")}
    ways = [
        f"{way}={pictures[name]}" for way, name in (("pick", "harmful"), ("drop", "harmless"), ("paste", "harmless"))
    ]
    found = node("browse.mjs", shutil.which("chromium"), address, QUESTION, *ways)
    harmful, harmless, again = found["asked"]
    refusal = json.loads((patched / "config.json").read_text())["sasa"]["refusal"]
    assert [harmful[name]["state"] for name in ("before", "after")] == ["answered", "refused"]
    assert harmful["after"]["answer"].strip() == refusal != harmful["before"]["answer"].strip()
    assert [harmless[name]["state"] for name in ("before", "after")] == ["answered", "answered"]
    assert harmless["after"]["answer"] == harmless["before"]["answer"] == again["after"]["answer"]
    for name, shown in (("harmful", harmful), ("harmless", harmless)):
        probability, refused = judged(patched, pictures[name])
        assert refused == (name == "harmful")
        for column in ("before", "after"):
            assert shown[column]["probability"] == pytest.approx(probability, abs=CLOSE)
