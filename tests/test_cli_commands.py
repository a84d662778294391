"""The commands beside the main one: fetch, trace and verify."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cli_steps import Tiny, contents, copied, fails, flags, flip, invoke, message_of, succeeds

from sasa_export.models import family as families

# ---------------------------------------------------------------------------------------- fetch and trace


def test_fetch(tiny_model: Tiny, place: Path) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    source = tiny_model("llava", shards=3)
    result = succeeds("fetch", *flags(source, place / "base"))
    assert str(place / "base") in result.stdout
    assert contents(place / "base") == contents(source)
    model, info = LlavaForConditionalGeneration.from_pretrained(place / "base", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = tiny.prompts(
        AutoProcessor.from_pretrained(place / "base"), images=True, count=2, seed=0, padding_side="left"
    )
    assert torch.isfinite(model(**inputs).logits).all()
    succeeds("fetch", *flags(source, place / "base", "--force"))
    assert [path.name for path in place.iterdir()] == ["base"]
    assert "there is no model" in fails("fetch", *flags("no-such-model", place / "other"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_trace(tiny_model: Tiny, family: str) -> None:
    """Every node on a line with its module and inputs, and the decoder drawn before and after."""
    model = tiny_model(family)
    printed = succeeds("trace", "--model", str(model), "--safety-layer", "1", "--semantic-layer", "3").stdout
    listed, before, after = printed.split("```mermaid")
    rows = [line.split() for line in listed.splitlines() if "<-" in line]
    blocks = [f"layers.{index}" for index in range(6)]
    assert [row[0] for row in rows] == ["vision", "projector", "embed", *blocks, "norm", "head"]
    assert [row[1] for row in rows] == ["vision", "projector", "embed", *["block"] * 6, "norm", "head"]
    modules = families.family_of(family).modules
    assert [row[2] for row in rows if row[1] != "block"] == [
        modules[role] for role in ("vision", "projector", "embedding", "norm", "head")
    ]
    assert [row[2] for row in rows if row[1] == "block"] == [f"{modules['blocks']}.{index}" for index in range(6)]
    assert all("attention_mask: " in " ".join(row) for row in rows if row[1] == "block")
    assert "safety layer 1, semantic layer 3 (given by the user)" in listed
    assert before.count("-->") == 5 and '["blocks 0 to 5"]' in before
    for label in ("safety layer 1", "semantic layer 3", "projection", "second lane: blocks 2 to 5", "probe", "gate"):
        assert f'["{label}"]' in after and f'["{label}"]' not in before
    assert "✓" in succeeds("trace", "--model", str(model), "--check").stdout
    assert "✓" in succeeds("trace", "--model", str(model), "--check", "--load").stdout


def test_trace_says_what_the_safety_layer_is_from(llava: Path) -> None:
    assert "scaled by depth from LLaVA-1.5-7B, not measured" in succeeds("trace", "--model", str(llava)).stdout


@pytest.mark.parametrize(
    "role, path, said",
    [
        ("norm", "model.language_model.final_norm", "no module model.language_model.final_norm (norm)"),
        (
            "blocks",
            "model.vision_tower.encoder.layers",
            "model.vision_tower.encoder.layers should be a list of 6 blocks",
        ),
        ("norm", "model.vision_tower.post_layernorm", "model.vision_tower.post_layernorm should run as step 7"),
        ("head", "model.multi_modal_projector.linear_2", "model.multi_modal_projector.linear_2 should run as step 8"),
        ("embedding", "model.vision_tower.embeddings", "model.vision_tower.embeddings should run as step 0"),
        ("projector", "model.connector", "no module model.connector (projector)"),
        ("head", "model.language_model.norm", "model.language_model.norm"),
    ],
)
def test_trace_of_a_model_that_its_family_does_not_describe(
    llava: Path, place: Path, monkeypatch: pytest.MonkeyPatch, role: str, path: str, said: str
) -> None:
    """`trace --check`, `trace` and the patch itself name the node that is not where the file says."""
    from dataclasses import replace

    family = families.families()["llava"]
    changed = replace(family, modules={**family.modules, role: path})
    monkeypatch.setattr(families, "families", lambda: {"llava": changed})
    for arguments in (["trace", "--model", str(llava), "--check"], ["trace", "--model", str(llava)]):
        message = fails(*arguments)
        assert said in message
        assert "graphs/llava.toml" in message or "should be a list" in message
    assert said in fails(*flags(llava, place / "out"))
    assert not list(place.iterdir())


# ------------------------------------------------------------------------------------------------- verify


def test_verify_of_a_good_directory(patched: Path) -> None:
    result = succeeds("verify", str(patched), "--files")
    lines = result.stderr.splitlines()
    assert len(lines) == 5 and all("✓" in line for line in lines)
    assert "files are those that were exported: 12 of 12 by SHA-256" in result.stderr


def test_verify_without_cases_says_so(patched: Path) -> None:
    """A directory written with `--verify files` cannot be verified in full, and that is not silently a pass."""
    result = invoke("verify", str(patched))
    assert result.exit_code == 1
    assert "✗ there are cases to verify" in result.stderr
    assert "Error:" in result.stderr.splitlines()[-1]


def test_verify_of_changed_files(patched: Path, tmp_path: Path) -> None:
    changes: dict[str, Callable[[Path], Any]] = {
        "model-00001-of-00002.safetensors": lambda path: flip(path, -1),
        "model-00002-of-00002.safetensors": lambda path: flip(path, -1),
        "modeling_sasa.py": lambda path: path.write_text(path.read_text() + "\n"),
        "config.json": lambda path: path.write_text(path.read_text() + "\n"),
        "chat_template.jinja": lambda path: path.unlink(),
        "tokenizer.json": lambda path: path.write_text("{}"),
        "extra.txt": lambda path: path.write_text("more"),
    }
    for number, (name, change) in enumerate(changes.items()):
        directory = copied(patched, tmp_path / str(number))
        change(directory / name)
        result = invoke("verify", str(directory), "--files")
        assert result.exit_code == 1, name
        assert f"✗ files are those that were exported: 1 differ: {name}" in result.stderr
        assert "failed its verification" in message_of(1, result.stderr)


@pytest.mark.parametrize(
    "name, text",
    [
        ("sasa-export.json", "{"),
        ("sasa-export.json", "{}"),
        ("sasa-export.json", None),
        ("config.json", "{"),
        ("config.json", "{}"),
        ("modeling_sasa.py", "def ("),
        ("modeling_sasa.py", None),
        ("model.safetensors.index.json", "{"),
        ("model-00002-of-00002.safetensors", "no tensors"),
        ("model-00001-of-00002.safetensors", None),
    ],
)
def test_verify_of_damaged_files(patched: Path, tmp_path: Path, name: str, text: str | None) -> None:
    directory = copied(patched, tmp_path)
    (directory / name).unlink()
    if text is not None:
        (directory / name).write_text(text)
    fails("verify", str(directory), "--files")


def test_verify_of_what_is_no_patched_directory(llava: Path, tmp_path: Path) -> None:
    fails("verify", str(llava), "--files")
    fails("verify", str(tmp_path / "none"), "--files")
    fails("verify", str(tmp_path), "--files")
    (tmp_path / "file").write_text("text")
    fails("verify", str(tmp_path / "file"), "--files")
