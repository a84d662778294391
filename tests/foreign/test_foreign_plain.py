"""Decoders that know nothing of the guard, in the layout of transformers.js, patched as the graphs that they are.

They are exported here by torch, from the very models that are guarded in torch, which says what is right: texts and
pictures, pads and steps. And what cannot be patched is refused in one line, and nothing is written.
"""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import tiny
from cli_steps import fails, flags, succeeds
from onnx_runner import Runner, batch
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors.numpy import save_file
from test_onnx_parity import STEPS, TOLERANCE, follow

DECODER = "onnx/decoder_model_merged.onnx"
FAMILIES = [
    pytest.param(
        family, opset, marks=[pytest.mark.xdist_group(f"onnx-{family}"), *[pytest.mark.slow] * (family != "llava")]
    )
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
        guard, place = split(family), tmp_path_factory.mktemp("probe")
        probe = {name: value.detach().numpy() for name, value in guard.model.sasa.probe.named_parameters()}
        save_file({f"sasa.probe.{name}": value for name, value in probe.items()}, place / "probe.safetensors")
        return {
            "probe": place / "probe.safetensors", "safety_layer": guard.safety, "semantic_layer": guard.semantic,
            "threshold": guard.model.config.sasa["threshold"], "refusal": "I will not help.", "verify": "files",
        }  # fmt: skip

    return given


@pytest.mark.parametrize("family, opset", FAMILIES)
def test_prompts_and_steps(family: str, opset: int, split: Any, plain: Any, options: Any, tmp_path: Path) -> None:
    succeeds(*flags(plain(family, opset), tmp_path / "patched", **options(family)))
    guard, seen = split(family), set()
    runner = Runner(tmp_path / "patched")
    for count in (1, 3, 6):
        states, differences = follow(guard, runner, batch(guard, count=count), STEPS)
        assert max(differences) < TOLERANCE, differences
        seen |= set(states)
    assert seen == {0.0, float(len(guard.refusal))}, "both verdicts must have been seen"
    _, differences = follow(guard, runner, batch(guard, count=3, side="right"), 0)
    assert max(differences) < TOLERANCE


def refused(directory: Path, place: Path, given: dict[str, Any]) -> str:
    """The one line in which a directory is refused; and nothing has been written."""
    said = fails(*flags(directory, place / "patched", **given))
    assert not list(place.iterdir()), "something was written"
    return said


@pytest.fixture
def changed(plain: Any, tmp_path: Path) -> Callable[[Callable[[ir.Model], None]], Path]:
    """A copy of the plain LLaVA whose decoder somebody changed."""

    def copied(change: Callable[[ir.Model], None]) -> Path:
        directory = shutil.copytree(plain("llava"), tmp_path / "changed")
        model = ir.load(directory / DECODER)
        change(model)
        ir.save(model, directory / DECODER)
        return directory

    return copied


@pytest.mark.xdist_group("onnx-llava")
class TestRefused:
    @pytest.fixture
    def given(self, options: Any) -> dict[str, Any]:
        return dict(options("llava"))

    def test_shared_keys(self, changed: Any, place: Path, given: Any) -> None:
        """The last block looks at the keys and values of the one before it."""

        def share(model: ir.Model) -> None:
            graph, last = model.graph, tiny.LAYERS - 1
            for kind in ("key", "value"):
                named = {value.name: value for value in (*graph.inputs, *graph.outputs)}
                mine, other = (named[f"past_key_values.{layer}.{kind}"] for layer in (last, last - 1))
                mine.replace_all_uses_with(other)
                graph.inputs.remove(mine)
                graph.outputs.remove(named[f"present.{last}.{kind}"])

        assert "block" in refused(changed(share), place, given)

    def test_cross_attention(self, changed: Any, place: Path, given: Any) -> None:
        def look_elsewhere(model: ir.Model) -> None:
            graph = model.graph
            shape = ir.Shape(["batch_size", "encoder_sequence_length", tiny.HIDDEN])
            states = ir.Value(name="encoder_hidden_states", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
            graph.inputs.append(states)
            product = next(node for node in graph if node.op_type == "MatMul")
            axes = ir.Value(name="axes", const_value=ir.tensor([1], name="axes"))
            graph.register_initializer(axes)
            mean = ir.Node("", "ReduceMean", [states, axes])
            added = ir.Node("", "Add", [product.outputs[0], mean.outputs[0]])
            graph.insert_after(product, [mean, added])
            product.outputs[0].replace_all_uses_with(added.outputs[0])
            added.replace_input_with(0, product.outputs[0])

        assert "encoder_hidden_states" in refused(changed(look_elsewhere), place, given)

    def test_a_merged_decoder(self, changed: Any, place: Path, given: Any) -> None:
        """An If around all of it, as older exports have: one branch with a past, one without."""

        def merge(model: ir.Model) -> None:
            graph = model.graph
            outputs = list(graph.outputs)
            flag = ir.Value(name="use_cache_branch", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([1]))
            branches = []
            for suffix in ("then", "else"):
                kept = [ir.Node("", "Identity", [value]) for value in outputs]
                for node, value in zip(kept, outputs, strict=True):
                    node.outputs[0].name = f"{value.name}.{suffix}"
                    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
                branches.append(ir.Graph([], [node.outputs[0] for node in kept], nodes=kept, name=suffix))
            both = [ir.AttrGraph(f"{branch.name}_branch", branch) for branch in branches]
            around = ir.Node("", "If", [flag], both, num_outputs=len(outputs))
            graph.inputs.append(flag)
            graph.append(around)
            for value, new in zip(outputs, around.outputs, strict=True):
                new.name, value.name = value.name, f"{value.name}.inside"
                new.type, new.shape = value.type, value.shape
            graph.outputs[:] = list(around.outputs)

        said = refused(changed(merge), place, given)
        assert "If" in said or "use_cache_branch" in said

    def test_an_unknown_attention(self, changed: Any, place: Path, given: Any) -> None:
        def rename(model: ir.Model) -> None:
            for node in model.graph:
                if node.op_type == "Attention":
                    node.domain, node.op_type = "vendor", "FlashAttention"
            model.opset_imports["vendor"] = 1

        assert "FlashAttention" in refused(changed(rename), place, given)

    def test_dynamic_int8(self, plain: Any, place: Path, tmp_path: Path, given: Any) -> None:
        directory = shutil.copytree(plain("llava"), tmp_path / "rounded")
        quantize_dynamic(plain("llava") / DECODER, directory / DECODER, weight_type=QuantType.QInt8)
        assert "int8" in refused(directory, place, given)

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "onnx/embed_tokens.onnx"])
    def test_a_missing_file(self, name: str, plain: Any, place: Path, tmp_path: Path, given: Any) -> None:
        directory = shutil.copytree(plain("llava"), tmp_path / "incomplete")
        (directory / name).unlink()
        assert Path(name).stem in refused(directory, place, given)

    def test_a_patched_directory(self, plain: Any, place: Path, tmp_path: Path, given: Any) -> None:
        succeeds(*flags(plain("llava"), tmp_path / "first", **given))
        assert "patched" in refused(tmp_path / "first", place, given)
        config = json.loads((tmp_path / "first" / "config.json").read_text())
        del config["sasa"], config["quantization_config"]
        (tmp_path / "first" / "config.json").write_text(json.dumps(config))
        assert "guarded" in refused(tmp_path / "first", place, given)
