"""A patched directory gives a guarded model or an error, whatever happened to it and however it is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from cli_steps import invoke, settle
from conftest import Guard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from sasa_export.runtime.settings import FORMAT, SEAL

Guards = Callable[..., Guard]
Edit = Callable[[Path], Any]
Outcomes = dict[str, str]

# These tests share one child process, so they stay with one worker.
pytestmark = pytest.mark.xdist_group("fail-closed")

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
AUTO = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel", "AutoModelForMultimodalLM")


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


def probe_of(value: float) -> Edit:
    return of_tensors("sasa.probe.weight", lambda tensors: tensors["sasa.probe.weight"].fill_(value))


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
    "null settings": (of_settings(graph=None, threshold=None), "sasa"),
    "another format": (of_settings(format=FORMAT + 1), "format"),
    "threshold 1": (of_settings(threshold=1.0), "threshold"),
    "negative threshold": (of_settings(threshold=-0.5), "threshold"),
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
    "zero probe": (probe_of(0.0), "sasa.probe"),
    "NaN probe": (probe_of(float("nan")), "sasa.probe"),
    "infinite probe": (probe_of(float("inf")), "sasa.probe"),
    "no probe weight": (without("sasa.probe.weight"), "sasa.probe.weight"),
    "no probe bias": (without("sasa.probe.bias"), "sasa.probe.bias"),
    "probe too long": (
        of_tensors("sasa.probe.weight", lambda tensors: tensors.update({"sasa.probe.weight": torch.ones(65)})),
        "mismatched",
    ),
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

LOAD = """
import json, sys
import torch
import transformers
torch.set_num_threads(1)
found = {}
for name, (directory, cls, options) in json.loads(sys.argv[1]).items():
    try:
        if options.pop("opened", False):
            options["config"] = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=True)
        model = getattr(transformers, cls).from_pretrained(directory, **options)
        with torch.no_grad():
            guarded = "unsafe_probability" in model(input_ids=torch.tensor([[1, 65, 70, 75, 80, 85]]))
        found[name] = "loaded, " + ("guarded" if guarded else "UNGUARDED")
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
assert "sasa_export" not in sys.modules
print("\\n" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def outcomes(
    guard: Guards, fresh: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], str]:
    """What became of each attempt to load, all made in one process."""
    root = tmp_path_factory.mktemp("damaged")
    jobs: dict[str, tuple[str, str, dict[str, bool]]] = {}
    for family in tiny.FAMILIES:
        for cls in (*AUTO, *STOCK[family]):
            jobs[f"{family} {cls}"] = (str(guard(family).directory), cls, {})
    for number, (name, (edit, _)) in enumerate({**DAMAGE, "nothing": (lambda directory: None, "")}.items()):
        # A name of its own for each, since code is cached by the directory's name.
        directory = shutil.copytree(guard("llava").directory, root / f"case{number}")
        edit(directory)
        jobs[name] = (str(directory), AUTO[0], {"trust_remote_code": True})
    # Last, since what these register stays registered in that process.
    for family in tiny.FAMILIES:
        directory = guard(family).directory
        jobs[f"{family} opened"] = (str(directory), STOCK[family][0], {"opened": True})
        for cls in AUTO[1:]:
            jobs[f"{family} {cls} trusted"] = (str(directory), cls, {"trust_remote_code": True})
    found: Outcomes = fresh(LOAD, jobs)
    return found.__getitem__


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_other_ways_to_load(outcomes: Callable[[str], str], family: str) -> None:
    """Stock classes raise with the sentence of the seal, and Auto classes without trust name what they need."""
    for cls in STOCK[family]:
        assert SEAL in outcomes(f"{family} {cls}"), cls
    assert SEAL in outcomes(f"{family} opened")
    for cls in AUTO:
        assert "trust_remote_code" in outcomes(f"{family} {cls}"), cls
    for cls in AUTO[1:-1]:
        assert not outcomes(f"{family} {cls} trusted").startswith("loaded"), cls
    assert outcomes(f"{family} {AUTO[-1]} trusted") == "loaded, guarded"


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_directory_does_not_load(outcomes: Callable[[str], str], name: str) -> None:
    """It is an error when it is loaded, and that names what is wrong."""
    assert outcomes("nothing") == "loaded, guarded"
    error, (_, named) = outcomes(name), DAMAGE[name]
    assert not error.startswith("loaded") and named in error, error
    assert len(error.partition(": ")[2]) > 10, error


@pytest.mark.parametrize("version", ["4.57.1", "6.0.0"])
def test_another_major_version_of_transformers(guard: Guards, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """The modeling file refuses a transformers that it was not written for, and says which one it needs."""
    source = (guard("llava").directory / "modeling_sasa.py").read_text()
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ImportError, match=r"transformers 5.*" + version.replace(".", r"\.")):
        exec(compile(source, "modeling_sasa.py", "exec"), {"__name__": "modeling_sasa"})


def test_serving_engines_are_told_no(guard: Guards) -> None:
    """vLLM and others ask this before they run a decoder under a head of their own."""
    guarded = guard("llava")
    assert guarded.model.is_backend_compatible() is False and guarded.stock.is_backend_compatible() is True


# ----------------------------------------------------------------------------------------------------- verify


def flip(directory: Path) -> None:
    """Change one byte in the middle of the weights."""
    path = shard_of(directory, HEAD)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link(directory: Path) -> None:
    """A shard is a link to the same bytes outside the directory."""
    shard, outside = shard_of(directory, HEAD), directory.parent / f"{directory.name}-outside.safetensors"
    shutil.move(shard, outside)
    shard.symlink_to(outside)


# Changes that leave a directory in which a guarded model loads, and the file that only the checksums tell of.
QUIET: dict[str, tuple[Edit, str]] = {
    "one byte of the weights": (flip, "model-00001-of-00002.safetensors"),
    "a line more in the code": (lambda directory: (directory / MODELING).open("a").write("# more\n"), MODELING),
    "another probe": (
        of_tensors("sasa.probe.weight", lambda tensors: tensors["sasa.probe.weight"].neg_()),
        "model-00002-of-00002.safetensors",
    ),
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
