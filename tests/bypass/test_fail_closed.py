"""A patched directory gives a guarded model or an error, whatever happened to it and however it is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
import torch
import transformers
from cli_steps import flip, invoke, settle, write_probe
from conftest import Guard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import sasa_export
from sasa_export.manifest import write_manifest
from sasa_export.runtime.settings import FORMATS, SEAL
from sasa_export.verify import verify_directory

Guards = Callable[..., Guard]
Edit = Callable[[Path], Any]

# With test_fresh_process, which needs the same models.
pytestmark = pytest.mark.xdist_group("fresh-process")

INDEX, MODELING = "model.safetensors.index.json", "modeling_sasa.py"
HEAD = "language_model.lm_head.weight"  # as the shards of llava name it

# Stock classes whose shapes fit: the family's own, its backbone's, and those of its relatives.
STOCK: dict[str, tuple[str, ...]] = {
    "llava": ("LlavaForConditionalGeneration", "LlavaModel", "LlamaForCausalLM", "LlavaNextForConditionalGeneration"),
    "llava_next": ("LlavaNextForConditionalGeneration", "LlavaForConditionalGeneration", "LlamaForCausalLM"),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLTextModel", "Qwen2VLForConditionalGeneration"),
    "smolvlm": ("SmolVLMForConditionalGeneration", "Idefics3ForConditionalGeneration", "LlamaForCausalLM"),
    "gemma3": ("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM", "Gemma3ForSequenceClassification"),
    "idefics3": ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration", "LlamaForCausalLM"),
}

# Each loader is an expression; `d` is the directory, {trust} whether its code may be run, {stock} the family's class.
AUTO = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
CONFIG = "transformers.AutoConfig.from_pretrained(d, trust_remote_code={trust})"
LOADERS = {
    **{
        f'pipeline("{task}")': f'transformers.pipeline("{task}", model=d, trust_remote_code={{trust}}).model'
        for task in ("image-text-to-text", "any-to-any", "text-generation", "feature-extraction")
    },
    **{name: f"transformers.{name}.from_pretrained(d, trust_remote_code={{trust}})" for name in AUTO},
    **{
        f"{name}.from_config": f"transformers.{name}.from_config({CONFIG}, trust_remote_code={{trust}})"
        for name in AUTO[:2]
    },
    "transformers serve": 'ModelLoader("cpu", "auto", {trust})._load_model(d)',
    "the stock class, handed the directory's configuration": f"{{stock}}.from_pretrained(d, config={CONFIG})",
}
# Those that give the guarded class, with trust. All others load nothing, with and without.
KEEP = {'pipeline("image-text-to-text")', *AUTO[2:], "transformers serve"}

LOAD = """
import json, sys
import torch, transformers
torch.set_num_threads(1)
found = {}
for name, (d, expression) in json.loads(sys.argv[1]).items():
    try:
        if "ModelLoader" in expression:
            from transformers.cli.serving.model_manager import ModelLoader
        model = eval(expression)
        with torch.no_grad():
            output = model(input_ids=torch.tensor([[1, 65, 70, 75, 80, 85]]))
        guarded = getattr(output, "unsafe_probability", None) is not None
        found[name] = "guarded" if guarded else "UNGUARDED: " + type(model).__name__
    except Exception as error:
        found[name] = "error: " + type(error).__name__ + ": " + str(error)
assert "sasa_export" not in sys.modules
print("\\n" + json.dumps(found))
"""


def of_settings(**values: Any) -> Edit:
    """Other values under `sasa` in config.json."""
    return lambda directory: settle(directory, **values)


def without_settings(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    del config["sasa"]
    (directory / "config.json").write_text(json.dumps(config))


def without_node(operation: str) -> Edit:
    """The graph without the nodes of an operation."""

    def edit(directory: Path) -> None:
        graph = json.loads((directory / "config.json").read_text())["sasa"]["graph"]
        settle(directory, graph=[node for node in graph if node["op"] != operation])

    return edit


def shard_of(directory: Path, tensor: str) -> Path:
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][tensor]


def of_tensors(holding: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    """An edit of the shard that holds a tensor; the index follows."""

    def edit(directory: Path) -> None:
        index, path = json.loads((directory / INDEX).read_text()), shard_of(directory, holding)
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        held = {name: file for name, file in index["weight_map"].items() if file != path.name}
        index["weight_map"] = held | dict.fromkeys(tensors, path.name)
        (directory / INDEX).write_text(json.dumps(index))

    return edit


def probe_of(weight: torch.Tensor) -> Edit:
    return of_tensors("sasa.probe.weight", lambda tensors: tensors.update({"sasa.probe.weight": weight}))


def without(tensor: str) -> Edit:
    return of_tensors(tensor, lambda tensors: tensors.pop(tensor))


def cut(directory: Path) -> None:
    """Leave half of the large shard."""
    path = shard_of(directory, HEAD)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# What is done to a directory, and what the error of loading it must name.
DAMAGE: dict[str, tuple[Edit, str]] = {
    # First, since the type is known to the process once one of its directories is loaded.
    "no modeling file": (lambda directory: (directory / "modeling_sasa.py").unlink(), "modeling_sasa.py"),
    "no settings": (without_settings, "sasa"),
    "another format": (of_settings(format=FORMATS[-1] + 1), "format"),
    "threshold 1": (of_settings(threshold=1.0), "threshold"),
    "threshold NaN": (of_settings(threshold=float("nan")), "threshold"),
    "another gate": (of_settings(gate="off"), "gate 'off'"),
    "threshold as text": (of_settings(threshold="0.5"), "threshold"),
    "empty refusal": (of_settings(refusal=" "), "refusal"),
    "a special token in the refusal": (of_settings(refusal="No. </s> Sure:"), "special token"),
    "a refusal too long": (of_settings(refusal="No, I will not. " * 40), "more than 250 tokens"),
    "no refusal tokens": (of_settings(refusal_token_ids=[]), "refusal"),
    "no gate": (without_node("gate"), "gate"),
    "no taps": (without_node("tap"), "graph"),
    "blocks missing in the graph": (without_node("block"), "blocks"),
    "zero probe": (probe_of(torch.zeros(3 * tiny.HIDDEN)), "sasa.probe"),
    "NaN probe": (probe_of(torch.full((3 * tiny.HIDDEN,), torch.nan)), "sasa.probe"),
    "no probe weight": (without("sasa.probe.weight"), "sasa.probe.weight"),
    "probe too long": (probe_of(torch.ones(3 * tiny.HIDDEN + 1)), "mismatched"),
    "a tensor too many": (
        of_tensors("sasa.probe.weight", lambda tensors: tensors.update({"sasa.other": torch.ones(3)})),
        "sasa.other",
    ),
    "a weight missing": (without(HEAD), "lm_head.weight"),
    # transformers prefers a single file to the shards beside it.
    "the original's file beside": (
        lambda directory: shutil.copyfile(shard_of(directory, HEAD), directory / "model.safetensors"),
        "sasa.probe",
    ),
    "half a shard": (cut, ""),
}


@pytest.fixture(scope="module")
def outcomes(guard: Guards, fresh: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What became of each attempt to load, all made in one process, by its name."""
    root = tmp_path_factory.mktemp("damaged")
    jobs: dict[str, tuple[str, str]] = {}
    for family in tiny.FAMILIES:
        for cls in (*STOCK[family], *AUTO):
            jobs[f"{family} {cls}"] = (str(guard(family).directory), f"transformers.{cls}.from_pretrained(d)")
    for number, (name, (edit, _)) in enumerate({**DAMAGE, "nothing": (lambda directory: None, "")}.items()):
        # A name of its own for each, since code is cached by the directory's name.
        directory = shutil.copytree(guard("llava").directory, root / f"case{number}")
        edit(directory)
        jobs[name] = (str(directory), LOADERS[AUTO[2]].format(trust=True))
    return fresh(LOAD, jobs)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_stock_classes(outcomes: dict[str, str], family: str) -> None:
    """They raise with the sentence of the seal, and Auto classes without trust name what they need."""
    for cls in STOCK[family]:
        assert SEAL in outcomes[f"{family} {cls}"], cls
    for cls in AUTO:
        assert "trust_remote_code" in outcomes[f"{family} {cls}"], cls


@pytest.mark.slow
@pytest.mark.parametrize("trust", [False, True])
def test_a_loader_fails_or_keeps_the_gate(guard: Guards, fresh: Callable[..., Any], trust: bool) -> None:
    """Each loader, with each family, in one process that does not know this project."""
    jobs = {}
    for family in tiny.FAMILIES:
        for name, expression in LOADERS.items():
            call = expression.format(trust=trust, stock=f"transformers.{STOCK[family][0]}")
            jobs[f"{name}, {family}"] = (str(guard(family).directory), call)
    for name, outcome in fresh(LOAD, jobs).items():
        wanted = "guarded" if name.rpartition(", ")[0] in KEEP and trust else "error"
        assert outcome.partition(":")[0] == wanted, f"{name}: {outcome}"


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_directory_does_not_load(outcomes: dict[str, str], name: str) -> None:
    """It is an error when it is loaded, and that names what is wrong."""
    assert outcomes["nothing"] == "guarded"
    error, (_, named) = outcomes[name], DAMAGE[name]
    assert error.startswith("error: ") and named in error and len(error) > 30, error


def test_an_old_major_version_of_transformers(guard: Guards, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modeling file refuses one that lacks what it imports, and says which one it needs. A new one has to prove."""
    source = (guard("llava").directory / "modeling_sasa.py").read_text()
    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"transformers 5.*4\.57\.1"):
        exec(compile(source, "modeling_sasa.py", "exec"), {"__name__": "modeling_sasa"})


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_steps_of_vllm(guard: Guards, family: str) -> None:
    """vLLM and SGLang take a model that they do not know through transformers in these steps, and stop at each.

    The architecture is no class of transformers; the class behind the directory's auto_map says that it is not
    compatible; and the class that they would build, AutoModel, does not know the configuration.
    """
    guarded = guard(family)
    assert not hasattr(transformers, guarded.model.config.architectures[0])
    assert guarded.model.is_backend_compatible() is False and guard("llava").stock.is_backend_compatible() is True
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        transformers.AutoModel.from_config(guarded.model.config, trust_remote_code=True)


@pytest.mark.slow
def test_formats_mixed_up(guard: Guards, exported: Any, fresh: Callable[..., Any], tmp_path: Path) -> None:
    """Neither weights put beside the graphs nor the graphs' configuration beside the weights give a plain model."""
    patched = guard("llava").directory
    onnx = Path(shutil.copytree(exported(patched), tmp_path / "onnx"))
    write_manifest(onnx, {})
    both = Path(shutil.copytree(onnx, tmp_path / "both"))
    for path in patched.glob("*.safetensors*"):
        shutil.copyfile(path, both / path.name)
    other = Path(shutil.copytree(patched, tmp_path / "other"))
    shutil.copyfile(onnx / "config.json", other / "config.json")
    assert type(AutoProcessor.from_pretrained(onnx)).__name__ == "LlavaProcessor", "it must stay readable"
    jobs = {
        f"{path.name} {cls}": (str(path), f"transformers.{cls}.from_pretrained(d)")
        for path in (onnx, both, other)
        for cls in (*STOCK["llava"][:3], "LlamaModel", "CLIPVisionModel", *AUTO)
    }
    outcomes = fresh(LOAD, jobs)
    assert all(outcome.startswith("error: ") for outcome in outcomes.values()), outcomes
    for path, name in ((both, "model-00001-of-00002.safetensors"), (other, "config.json")):
        checks = verify_directory(path, only_files=True)
        assert name in " ".join(check.detail for check in checks if not check.passed), path


@pytest.mark.slow
def test_gguf_conversion(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """llama.cpp's converter does not know the architecture, and, were it made to, not the probe's tensors.

    It takes the architecture of a nested configuration, as LLaVA-1.5-7B's config.json names one, before that of the
    whole model.
    """
    source = Path(shutil.copytree(tiny_model("llava"), tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["architectures"] = ["LlamaForCausalLM"]
    (source / "config.json").write_text(json.dumps(config))
    probe = write_probe(tmp_path / "probe.safetensors", torch.ones(3 * tiny.HIDDEN))
    sasa_export.patch(sasa_export.Options(str(source), tmp_path / "patched", probe=probe, verify="files"))
    config = json.loads((tmp_path / "patched" / "config.json").read_text())
    assert not config["text_config"].get("architectures")
    assert config["architectures"] == ["SasaLlavaForConditionalGeneration"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, tiny.LAYERS)
    for name, is_known in (("sasa.probe.weight", 0), ("sasa.probe.bias", 0), ("model.layers.0.mlp.up_proj.weight", 1)):
        assert bool(names.get_name(name, try_suffixes=(".weight", ".bias"))) == is_known


# ----------------------------------------------------------------------------------------------------- verify


def link(directory: Path) -> None:
    """A shard is a link to the same bytes outside the directory."""
    shard, outside = shard_of(directory, HEAD), directory.parent / f"{directory.name}-outside.safetensors"
    shutil.move(shard, outside)
    shard.symlink_to(outside)


# Changes that leave a directory in which a guarded model loads, and the file that only the checksums tell of.
QUIET: dict[str, tuple[Edit, str]] = {
    "one byte of the weights": (lambda directory: flip(shard_of(directory, HEAD), -1000), "model-00001-of-00002.safe"),
    "a line more in the code": (lambda directory: (directory / MODELING).open("a").write("# more\n"), MODELING),
    "another probe": (probe_of(torch.ones(3 * tiny.HIDDEN)), "model-00002-of-00002.safetensors"),
    "a link that leads out of the directory": (link, "model-00001-of-00002.safetensors"),
    "a pickle beside": (lambda directory: torch.save({}, directory / "pytorch_model.bin"), "pytorch_model.bin"),
    "no template": (lambda directory: (directory / "chat_template.jinja").unlink(), "chat_template.jinja"),
    "no manifest": (lambda directory: (directory / "sasa-export.json").write_text("{}"), "sasa-export.json"),
}

TOKENIZED = ("a special token in the refusal", "a refusal too long")  # found where the model is loaded


@pytest.mark.parametrize("name", ["nothing", *QUIET, *(name for name in DAMAGE if name not in TOKENIZED)])
def test_verify_names_every_change(guard: Guards, tmp_path: Path, name: str) -> None:
    """`verify` finds what was changed, also where a guarded model still loads."""
    directory = shutil.copytree(guard("llava").directory, tmp_path / "changed")
    edit, file = {**QUIET, **DAMAGE}.get(name, (lambda directory: None, ""))
    edit(directory)
    if name in QUIET:
        model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True)
        assert "unsafe_probability" in model(input_ids=torch.tensor([[1, 65, 70]]))
    result = invoke("verify", str(directory), "--files")
    assert isinstance(result.exception, SystemExit | None), result.exception
    wrong = [line.strip() for line in result.stderr.splitlines() if "✗" in line or "Error:" in line]
    assert (result.exit_code, bool(wrong)) == ((0, False) if name == "nothing" else (1, True)), result.stderr
    assert name not in QUIET or ("✗ files are those that were exported" in wrong[0] and file in wrong[0])
