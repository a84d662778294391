"""Models on the hub, from a stand-in on this machine: what is fetched, what is resumed, and what is said."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_steps import Tiny, fails, flags, succeeds
from quantized import write_scheme
from stand_in_hub import TOKEN, Hub, Repository, serving

from sasa_export.models import open_source

NAME = "somebody/tiny-llava"


@pytest.fixture
def hub(tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a sharded LLaVA under old names, in two revisions, with what else repositories hold beside it."""
    from huggingface_hub import constants

    revisions = {}
    for name, seed in (("main", 0), ("v1", 1)):
        revisions[name] = Path(shutil.copytree(tiny_model("llava", shards=3, seed=seed), tmp_path / name))
        others = "original/a.safetensors consolidated.safetensors onnx/config.json pytorch_model.bin model.gguf"
        for other in others.split():
            (revisions[name] / other).parent.mkdir(exist_ok=True)
            (revisions[name] / other).write_bytes(b"{}")
        (revisions[name] / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    assert "language_model.model.layers" in (revisions["main"] / "model.safetensors.index.json").read_text()
    with serving(Hub({NAME: Repository(revisions)})) as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        template = found.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between two tries
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield found


def test_a_patch_of_a_model_on_the_hub(hub: Hub, probe: Path, place: Path) -> None:
    """Only its own files come down; manifest and card name the commit, and a second run asks for no file again."""
    succeeds(*flags(NAME, place / "out", probe=probe, verify="files"))
    commit = hub.repositories[NAME].commit("main")
    manifest = json.loads((place / "out" / "sasa-export.json").read_text())
    assert (manifest["options"]["model"], manifest["commit"]) == (NAME, commit)
    card = (place / "out" / "README.md").read_text()
    assert f"base_model: {NAME}" in card and f"commit `{commit}`" in card
    asked = {path.partition("/resolve/")[2].partition("/")[2] for _, path in hub.asked if "/resolve/" in path}
    assert {"config.json", "tokenizer.json", "model-00001-of-00004.safetensors"} <= asked
    unwanted = ("original", "consolidated", "onnx", "pytorch_model", "gguf")
    assert not [name for name in asked if name.startswith(unwanted) or name.endswith(unwanted)]
    hub.asked.clear()
    succeeds(*flags(NAME, place / "again", probe=probe, verify="files"))
    assert not [path for method, path in hub.asked if method == "GET" and "/resolve/" in path]
    hub.repositories.clear()  # and where the hub has lost it, what is here will do
    succeeds(*flags(NAME, place / "offline", probe=probe, verify="files"))


def test_a_revision(hub: Hub, probe: Path, place: Path) -> None:
    weights = {}
    for revision in ("v1", hub.repositories[NAME].commit("v1"), None):
        given = {} if revision is None else {"revision": revision}
        out = place / str(revision)
        succeeds(*flags(NAME, out, probe=probe, verify="files", **given))
        manifest = json.loads((out / "sasa-export.json").read_text())
        assert manifest["commit"] == hub.repositories[NAME].commit(revision or "main")
        weights[revision] = (out / "model-00001-of-00004.safetensors").read_bytes()
    named, pinned, main = weights.values()
    assert named == pinned != main
    message = fails(*flags(NAME, place / "none", probe=probe, revision="v9"))
    assert f"{NAME} has no revision 'v9'. See {hub.endpoint}/{NAME}/commits/main" in message


def test_a_revision_of_what_is_on_no_hub(llava: Path, place: Path) -> None:
    for model in (str(llava), "smol-llava"):
        assert "--revision v1 is of a model on the hub" in fails(*flags(model, place / "out", revision="v1"))


def test_a_run_that_a_connection_ends_and_the_next(hub: Hub, place: Path) -> None:
    """The error is one line, and the next run asks for the files that are missing alone."""
    hub.ends_in = "model-00002-of-00004.safetensors"
    message = fails(*flags(NAME, place / "out"))
    assert "could not be fetched from the hub" in message and "which keeps the files that are whole" in message
    hub.ends_in = ""
    hub.asked.clear()
    open_source(NAME)
    asked = {path.rpartition("/")[2] for method, path in hub.asked if method == "GET"}
    assert "model-00002-of-00004.safetensors" in asked
    assert not {"config.json", "model-00001-of-00004.safetensors"} & asked


def test_a_model_that_is_refused_is_not_fetched(hub: Hub, place: Path) -> None:
    write_scheme(hub.repositories[NAME].revisions["main"], {"quant_method": "fp8"})
    said = fails(*flags(NAME, place / "out", format="onnx"))
    assert "is quantized by fp8, and ONNX graphs are made of plain weights" in said
    assert {path.rpartition("/")[2] for _, path in hub.asked if "/resolve/" in path} == {"config.json"}


def test_gated_and_private_models(hub: Hub, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says where to ask for access and how to log in; with a token they are fetched."""
    hub.repositories[NAME].access = "gated"
    message = fails(*flags(NAME, place / "out"))
    assert f"{NAME} is gated. Ask for access at {hub.endpoint}/{NAME}, then log in with `hf auth login`" in message
    hub.repositories[NAME].access = "private"
    message = fails(*flags(NAME, place / "out"))
    assert f"{NAME} is not at {hub.endpoint}, or private. Check the name; if it is private, log in" in message
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert open_source(NAME).commit == hub.repositories[NAME].commit("main")
    assert "is not at" in fails(*flags("somebody/nothing", place / "out"))
