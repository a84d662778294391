"""Loaders that would take the weights and drop the gate: each fails on the directory, or is shown to keep the gate."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
import torch
from cli_steps import write_probe
from conftest import Guard
from transformers import AutoProcessor

import sasa_export
from sasa_export.manifest import write_manifest
from sasa_export.verify import verify_directory
from sasa_export.writers.onnx import GRAPHS
from sasa_export.writers.onnx.layout import write_files

Guards = Callable[..., Guard]
Fresh = Callable[..., Any]

# The child process is shared among these tests, and the guarded models with test_fail_closed.py.
pytestmark = [pytest.mark.xdist_group("fail-closed"), pytest.mark.slow]

# Each loader is an expression; `d` is the directory, `trust` whether its code may be run, `config()` what AutoConfig
# makes of it, and `stock` the family's stock class.
TASKS = ("image-text-to-text", "any-to-any", "text-generation", "feature-extraction")
CLASSES = (
    "transformers.AutoModel", "transformers.AutoModelForCausalLM", "transformers.AutoModelForImageTextToText",
    "peft.AutoPeftModel", "peft.AutoPeftModelForCausalLM",
)  # fmt: skip
LOADERS = {
    **{f'pipeline("{task}")': f'pipeline("{task}", model=d, trust_remote_code=trust).model' for task in TASKS},
    **{name.split(".")[1]: f"{name}.from_pretrained(d, trust_remote_code=trust)" for name in CLASSES},
    **{
        f"{name}.from_config": f"transformers.{name}.from_config(config(), trust_remote_code=trust)"
        for name in ("AutoModel", "AutoModelForCausalLM")
    },
    "transformers serve": 'ModelManager(trust_remote_code=trust, device="cpu", dtype="auto")._load_model(d + "@main")',
    "the stock class, handed the directory's configuration": "stock.from_pretrained(d, config=config())",
}
# Those that give the guarded class, with trust. All others load nothing, with and without.
KEEP = {'pipeline("image-text-to-text")', "AutoModelForImageTextToText", "transformers serve"}

# Stock classes, tried on directories in which the two formats are mixed up.
STOCK = (
    "LlavaForConditionalGeneration", "LlavaModel", "LlamaForCausalLM", "LlamaModel", "CLIPVisionModel",
    "AutoModelForImageTextToText", "AutoModel", "AutoModelForCausalLM",
)  # fmt: skip

LOAD = """
import json, sys
import torch, transformers, peft
from transformers import AutoConfig, AutoModel, pipeline
from transformers.cli.serving.model_manager import ModelManager
from transformers.dynamic_module_utils import get_class_from_dynamic_module
torch.set_num_threads(1)
directories, loaders, mixed, onnx = json.loads(sys.argv[1])
found = {"loaders": [], "mixed": [], "vllm": []}
for d, name in mixed:
    try:
        found["mixed"].append("loaded " + type(getattr(transformers, name).from_pretrained(d)).__name__)
    except Exception as error:
        found["mixed"].append(type(error).__name__ + ": " + str(error))
found["processor"] = type(transformers.AutoProcessor.from_pretrained(onnx)).__name__
for trust in (False, True):
    for family, d, stock in directories:
        stock = getattr(transformers, stock)
        config = lambda: AutoConfig.from_pretrained(d, trust_remote_code=trust)
        for name, expression in loaders.items():
            try:
                model = eval(expression)
                with torch.no_grad():
                    output = model(input_ids=torch.tensor([[1, 65, 70, 75, 80, 85]]))
                guarded = getattr(output, "unsafe_probability", None) is not None
                outcome = ["guarded" if guarded else "UNGUARDED", type(model).__name__]
            except Exception as error:
                outcome = ["error", type(error).__name__ + ": " + str(error)]
            found["loaders"].append([family, trust, name, *outcome])
for family, d, stock in directories:
    config = AutoConfig.from_pretrained(d, trust_remote_code=True)
    resolved = getattr(transformers, config.architectures[0], None) is not None
    compatible = []
    for name, module in config.auto_map.items():
        if name.startswith("AutoModel"):
            compatible.append(get_class_from_dynamic_module(module, d).is_backend_compatible())
    try:
        built = type(AutoModel.from_config(config, trust_remote_code=True)).__name__
    except ValueError as error:
        built = str(error)
    found["vllm"].append([resolved, compatible, built])
assert "sasa_export" not in sys.modules
print("\\n" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def mixed(guard: Guards, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An ONNX directory (but for its graphs, which no loader here reads), and the two formats put into each other."""
    root = tmp_path_factory.mktemp("mixed")
    patched = guard("llava").directory
    onnx = root / "onnx"
    (onnx / "onnx").mkdir(parents=True)
    write_files(patched, onnx, AutoProcessor.from_pretrained(patched), dtype="float32", external={}, kinds=(), gate=1)
    for name in GRAPHS:
        (onnx / "onnx" / f"{name}.onnx").touch()
    write_manifest(onnx, {})
    both = Path(shutil.copytree(onnx, root / "both"))
    for path in patched.glob("*.safetensors*"):
        shutil.copyfile(path, both / path.name)
    other = Path(shutil.copytree(patched, root / "other"))
    shutil.copyfile(onnx / "config.json", other / "config.json")
    return {
        "the ONNX directory": onnx,
        "the ONNX directory with the safetensors put into it": both,
        "the safetensors directory with the ONNX config.json": other,
    }


@pytest.fixture(scope="module")
def found(guard: Guards, mixed: dict[str, Path], fresh: Fresh) -> dict[str, Any]:
    """What everything that loads did, in one process that does not know this project."""
    directories = [[f, str(guard(f).directory), type(guard(f).stock).__name__] for f in tiny.FAMILIES]
    jobs = [[str(path), name] for path in mixed.values() for name in STOCK]
    found: dict[str, Any] = fresh(LOAD, [directories, LOADERS, jobs, str(mixed["the ONNX directory"])])
    return found


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_fails_or_keeps_the_gate(found: dict[str, Any], name: str) -> None:
    for trust in (False, True):
        outcomes = {
            family: (outcome, said)
            for family, trusted, loader, outcome, said in found["loaders"]
            if (trusted, loader) == (trust, name)
        }
        assert list(outcomes) == list(tiny.FAMILIES)
        wanted = "guarded" if name in KEEP and trust else "error"
        assert all(outcome == wanted for outcome, _ in outcomes.values()), outcomes


def test_the_steps_of_vllm(found: dict[str, Any]) -> None:
    """vLLM and SGLang take a model that they do not know through transformers in these steps, and stop at each.

    The architecture is no class of transformers; the class behind the directory's auto_map says that it is not
    compatible; and the class that they would build, AutoModel, does not know the configuration.
    """
    assert len(found["vllm"]) == len(tiny.FAMILIES)
    for resolved, compatible, built in found["vllm"]:
        assert not resolved
        assert compatible and not any(compatible)
        assert "Unrecognized configuration class" in built


def test_formats_mixed_up(mixed: dict[str, Path], found: dict[str, Any]) -> None:
    """Neither weights put beside the graphs nor the graphs' configuration beside the weights give a plain model."""
    assert found["processor"] == "LlavaProcessor", "the graphs' configuration must stay readable"
    said = iter(found["mixed"])
    for what in mixed:
        outcomes = {name: next(said) for name in STOCK}
        loaded = [name for name, text in outcomes.items() if text.startswith("loaded ")]
        assert not loaded, (what, loaded)


def test_verify_says_what_is_mixed_up(mixed: dict[str, Path]) -> None:
    for what, name in zip(list(mixed)[1:], ("model-00001-of-00002.safetensors", "config.json"), strict=True):
        checks = verify_directory(mixed[what], only_files=True)
        assert name in " ".join(check.detail for check in checks if not check.passed), what


@pytest.fixture(scope="module")
def nested(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guarded llava whose source names the class of its language model too, as LLaVA-1.5-7B's config.json does."""
    folder = tmp_path_factory.mktemp("nested")
    source = Path(shutil.copytree(tiny_model("llava"), folder / "source"))
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["architectures"] = ["LlamaForCausalLM"]
    config["vision_config"]["architectures"] = ["CLIPVisionModel"]
    (source / "config.json").write_text(json.dumps(config))
    probe = write_probe(folder / "probe.safetensors", torch.ones(tiny.HIDDEN))
    sasa_export.patch(sasa_export.Options(str(source), folder / "patched", probe=probe, verify="files"))
    return folder / "patched"


def test_gguf_conversion(nested: Path) -> None:
    """llama.cpp's converter does not know the architecture, and, were it made to, not the probe's tensors.

    It takes the architecture of a nested configuration before that of the whole model.
    """
    config = json.loads((nested / "config.json").read_text())
    parts = [config["text_config"], config["vision_config"]]
    known = {(part.get("architectures") or config["architectures"])[0] for part in parts}
    assert known == {"SasaLlavaForConditionalGeneration"}
    weights = json.loads((nested / "model.safetensors.index.json").read_text())["weight_map"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, tiny.LAYERS)
    mapped = {key: names.get_name(key, try_suffixes=(".weight", ".bias")) for key in weights}
    assert mapped["sasa.probe.weight"] is None and mapped["sasa.probe.bias"] is None
    assert names.get_name("model.layers.0.mlp.up_proj.weight", try_suffixes=(".weight", ".bias")) is not None
