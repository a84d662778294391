"""Decoders that know nothing of the guard, in the layout of transformers.js, patched as the graphs that they are.

They are exported here by torch, from the very models that are guarded in torch, which says what is right: texts and
pictures, pads and steps. And what cannot be patched is refused in one line, and nothing is written.
"""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from cli_steps import fails, flags, succeeds, write_probe
from onnx_runner import STEPS, TOLERANCE, Runner, follow

pytestmark = pytest.mark.slow

DECODER = "onnx/decoder_model_merged.onnx"
FAMILIES = [
    pytest.param(family, opset, marks=pytest.mark.xdist_group(f"onnx-{family}"))
    for family, opset in (("llava", 23), ("llava", 20), ("gemma3", 23), ("qwen2_5_vl", 23), ("lfm2_vl", 23))
]


@pytest.fixture(scope="session")
def plain(split: Any, exported: Any, tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`plain(family, opset=23)`: an ONNX directory of the stock tiny model that somebody else could have exported."""

    @cache
    def made(family: str, opset: int) -> Path:
        from sasa_export.writers.onnx.graphs import decoder_graph, write_model
        from sasa_export.writers.onnx.recipes import recipe_of

        guard, out = split(family), tmp_path_factory.mktemp("plain")
        guarded = exported(guard.directory, opset=opset)
        (out / "onnx").mkdir()
        for path in guarded.glob("onnx/*"):
            if path.name.startswith(("embed_tokens.", "vision_encoder")):
                shutil.copy(path, out / "onnx")
        for path in tiny_model(family).iterdir():
            if path.suffix in (".json", ".jinja"):
                shutil.copy(path, out)
        write_model(decoder_graph(guard.stock, recipe_of(family), opset=opset), out / DECODER)
        return out

    return lambda family, opset=23: made(family, opset)


@pytest.fixture(scope="session")
def options(split: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The flags of a family's guard in torch, its probe among them."""

    def given(family: str) -> dict[str, Any]:
        guard, path = split(family), tmp_path_factory.mktemp("probe") / "probe.safetensors"
        probe = guard.model.sasa.probe
        return {
            "probe": write_probe(path, probe.weight.detach(), probe.bias.item()), "safety_layer": guard.safety,
            "semantic_layer": guard.semantic, "threshold": guard.model.config.sasa["threshold"],
            "refusal": "I will not help.", "verify": "files",
        }  # fmt: skip

    return given


@pytest.mark.parametrize("family, opset", FAMILIES)
def test_prompts_and_steps(family: str, opset: int, split: Any, plain: Any, options: Any, tmp_path: Path) -> None:
    succeeds(*flags(plain(family, opset), tmp_path / "patched", **options(family)))
    guard, seen = split(family), set()
    runner = Runner(tmp_path / "patched")
    for count in (1, 3, 6):
        states, differences = follow(guard, runner, guard.batch(count=count), STEPS)
        assert max(differences) < TOLERANCE, differences
        seen |= set(states)
    assert seen == {0.0, float(len(guard.refusal))}, "both verdicts must have been seen"
    _, differences = follow(guard, runner, guard.batch(count=3, padding_side="right"), 0)
    assert max(differences) < TOLERANCE


# -------------------------------------------------- what is refused; more of it is in test_foreign_blocks


def with_unknown_attention(directory: Path) -> str:
    model = ir.load(directory / DECODER)
    for node in model.graph:
        if node.op_type == "Attention":
            node.domain, node.op_type = "vendor", "FlashAttention"
    model.opset_imports["vendor"] = 1
    ir.save(model, directory / DECODER)
    return "FlashAttention"


def without_embedding(directory: Path) -> str:
    (directory / "onnx" / "embed_tokens.onnx").unlink()
    return "embed_tokens"


@pytest.mark.parametrize("change", [with_unknown_attention, without_embedding])
@pytest.mark.xdist_group("onnx-llava")
def test_what_cannot_be_patched(change: Any, plain: Any, place: Path, tmp_path: Path, options: Any) -> None:
    directory = shutil.copytree(plain("llava"), tmp_path / "changed")
    assert change(directory) in fails(*flags(directory, place / "patched", **options("llava")))
