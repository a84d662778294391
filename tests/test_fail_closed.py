"""A patched directory gives a guarded model or an error, whatever is done to it and however it is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import tiny
import torch
import transformers
from conftest import Guard
from records import note
from safetensors.torch import load_file, save_file
from sasa_export.runtime.nodes import FORMAT
from sasa_export.runtime.probe import Probe
from torch import nn
from transformers import LlavaForConditionalGeneration

from sasa_export.errors import RewriteError
from sasa_export.graph.rewrite import LaneSettings, rewrite
from sasa_export.graph.trace import trace
from sasa_export.models.family import family_of
from sasa_export.runtime.lane import recording, run_graph, watch
from sasa_export.runtime.settings import SEAL

Guards = Callable[..., Guard]
Fresh = Callable[..., Any]

# Most of these tests share one child process per subject, so they stay with one worker.
pytestmark = pytest.mark.xdist_group("fail-closed")

INDEX = "model.safetensors.index.json"
HEAD = "language_model.lm_head.weight"  # as the shards of llava name it
CAP = 2.0

# Stock classes whose shapes fit: the family's own, its backbone's, and those of its relatives.
STOCK: dict[str, tuple[str, ...]] = {
    "llava": (
        "LlavaForConditionalGeneration", "LlavaModel", "LlamaForCausalLM", "LlamaModel",
        "LlavaNextForConditionalGeneration", "VipLlavaForConditionalGeneration", "CLIPVisionModel",
    ),
    "llava_next": ("LlavaNextForConditionalGeneration", "LlavaForConditionalGeneration", "LlamaForCausalLM"),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel", "Qwen2_5_VLTextModel",
        "Qwen2VLForConditionalGeneration",
    ),
    "smolvlm": (
        "SmolVLMForConditionalGeneration", "SmolVLMModel", "Idefics3ForConditionalGeneration", "LlamaForCausalLM",
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration", "Gemma3Model", "Gemma3ForCausalLM", "Gemma3TextModel",
        "Gemma3ForSequenceClassification",
    ),
    "idefics3": ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration", "LlamaForCausalLM"),
}  # fmt: skip
# Stock classes that cannot read such a config.json at all, for reasons of their own.
FOREIGN = {"llava": "MistralForCausalLM", "gemma3": "Gemma2ForCausalLM", "qwen2_5_vl": "Qwen2ForCausalLM"}
AUTO = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel", "AutoModelForMultimodalLM")

LOAD = """
import json, sys
import torch
import transformers
torch.set_num_threads(1)
found = []
for directory, name, options in json.loads(sys.argv[1]):
    try:
        model = getattr(transformers, name).from_pretrained(directory, **options)
        found.append("loaded " + type(model).__name__)
    except Exception as error:
        found.append(str(error) or type(error).__name__)
assert "sasa_export" not in sys.modules
print("\\n" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def loads(guard: Guards, fresh: Fresh) -> dict[tuple[str, str, str], str]:
    """What loading each family through each class does, by (family, class, "trusted" or "plain")."""
    jobs: list[tuple[str, str, str]] = []
    for family in tiny.FAMILIES:
        names = [*STOCK[family], *AUTO, *([FOREIGN[family]] if family in FOREIGN else [])]
        jobs += [(family, name, "plain") for name in names]
        jobs += [(family, name, "trusted") for name in AUTO[1:]]
        # Last, since what it registers stays registered in that process.
    options = {"plain": {}, "trusted": {"trust_remote_code": True}}
    found = fresh(LOAD, [[str(guard(family).directory), name, options[how]] for family, name, how in jobs])
    return dict(zip(jobs, found, strict=True))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_stock_classes_say_how_to_load(loads: dict[tuple[str, str, str], str], family: str) -> None:
    """Each stock class that fits raises, and its error carries the seal's sentence."""
    names = STOCK[family]
    for name in names:
        assert SEAL in loads[family, name, "plain"], name
    what = f"stock classes on sasa_{family}: {', '.join(names)}"
    note("artefact", group="loaders", what=what, good=True, tried=len(names), says=f"ValueError: ... {SEAL}")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_auto_classes_without_trust(loads: dict[tuple[str, str, str], str], family: str) -> None:
    """Without `trust_remote_code` nothing loads, and the error names it."""
    for name in AUTO:
        assert "trust_remote_code" in loads[family, name, "plain"], name


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_other_classes_with_trust(loads: dict[tuple[str, str, str], str], family: str) -> None:
    """With `trust_remote_code`, classes other than AutoModelForImageTextToText give no model either."""
    for name in AUTO[1:]:
        assert not loads[family, name, "trusted"].startswith("loaded "), name


@pytest.mark.parametrize("family", FOREIGN)
def test_classes_of_other_families(loads: dict[tuple[str, str, str], str], family: str) -> None:
    """A text model of another family whose weights have the same names raises too."""
    assert not loads[family, FOREIGN[family], "plain"].startswith("loaded ")


# ---------------------------------------------------------------------------------------------- tampering

Edit = Callable[[Path], None]


def of_config(change: Callable[[dict[str, Any]], Any]) -> Edit:
    """An edit of config.json."""

    def edit(directory: Path) -> None:
        path = directory / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return edit


def setting(**values: Any) -> Edit:
    """Other values under `sasa` in config.json."""
    return of_config(lambda config: config["sasa"].update(values))


def without_node(*operations: str, index: int | None = None) -> Edit:
    """The graph without nodes of these operations, or without the one of block `index` among them."""

    def change(config: dict[str, Any]) -> None:
        graph = config["sasa"]["graph"]
        config["sasa"]["graph"] = [
            node for node in graph if node["op"] not in operations or (index is not None and node.get("index") != index)
        ]

    return of_config(change)


def of_tensors(change: Callable[[dict[str, torch.Tensor]], Any], *, holding: str = "sasa.probe.weight") -> Edit:
    """An edit of the shard that holds a tensor; the index follows."""

    def edit(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        shard = index["weight_map"][holding]
        tensors = load_file(directory / shard)
        change(tensors)
        (directory / shard).unlink()
        if tensors:
            save_file(tensors, directory / shard, metadata={"format": "pt"})
        held = {name: file for name, file in index["weight_map"].items() if file != shard}
        index["weight_map"] = {**held, **dict.fromkeys(tensors, shard)}
        (directory / INDEX).write_text(json.dumps(index))

    return edit


def forget_probe(directory: Path) -> None:
    """Take the probe out of the index alone."""
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if not name.startswith("sasa.")}
    (directory / INDEX).write_text(json.dumps(index))


def shard_of(directory: Path, tensor: str) -> Path:
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][tensor]


def overshadow(directory: Path) -> None:
    """Put the original's single file beside the shards: transformers would load it alone."""
    shutil.copyfile(shard_of(directory, HEAD), directory / "model.safetensors")


def cut(directory: Path) -> None:
    """Leave half of the large shard."""
    path = shard_of(directory, HEAD)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def unsealed_type(config: dict[str, Any]) -> None:
    config.update(model_type="llava", architectures=["LlavaForConditionalGeneration"])
    config.pop("auto_map")


def probe_of(value: float) -> Edit:
    return of_tensors(
        lambda tensors: tensors.update({"sasa.probe.weight": torch.full_like(tensors["sasa.probe.weight"], value)})
    )


TAMPERED: dict[str, Edit] = {
    # First, since the type is known to the process once one of its directories is loaded.
    "no modeling file": lambda directory: (directory / "modeling_sasa.py").unlink(),
    "no settings": of_config(lambda config: config.pop("sasa")),
    "null settings": of_config(lambda config: config.update(sasa=None)),
    "empty settings": of_config(lambda config: config.update(sasa={})),
    "another format": setting(format=FORMAT + 1),
    "no format": of_config(lambda config: config["sasa"].pop("format")),
    "safety layer below 0": setting(safety_layer=-1),
    "safety layer behind semantic layer": setting(safety_layer=4, semantic_layer=2),
    "semantic layer behind the last block": setting(semantic_layer=tiny.LAYERS),
    "layers that the graph does not have": setting(safety_layer=1, semantic_layer=3),
    "threshold 0": setting(threshold=0.0),
    "threshold 1": setting(threshold=1.0),
    "threshold 2": setting(threshold=2.0),
    "negative threshold": setting(threshold=-0.5),
    "null threshold": setting(threshold=None),
    "threshold NaN": setting(threshold=float("nan")),
    "threshold as text": setting(threshold="0.5"),
    "no refusal": setting(refusal_token_ids=[]),
    "null refusal": setting(refusal_token_ids=None),
    "refusal outside the vocabulary": setting(refusal_token_ids=[10**6, 2]),
    "no graph": setting(graph=[]),
    "no gate": without_node("gate"),
    "no probe node": without_node("probe"),
    "no lane": without_node("lane_block"),
    "a lane with a gap": without_node("lane_block", index=4),
    "no taps": without_node("tap"),
    "no projection": without_node("projection"),
    "no lane norm": without_node("lane_norm"),
    "stock model type": of_config(unsealed_type),
    "zero probe": probe_of(0.0),
    "NaN probe": probe_of(float("nan")),
    "infinite probe": probe_of(float("inf")),
    "NaN bias": of_tensors(lambda tensors: tensors.update({"sasa.probe.bias": torch.tensor(float("nan"))})),
    "no probe weight": of_tensors(lambda tensors: tensors.pop("sasa.probe.weight")),
    "no probe bias": of_tensors(lambda tensors: tensors.pop("sasa.probe.bias")),
    "no probe tensors": of_tensors(lambda tensors: tensors.clear()),
    "probe not in the index": forget_probe,
    "probe shard missing": lambda directory: shard_of(directory, "sasa.probe.weight").unlink(),
    "probe too long": of_tensors(lambda tensors: tensors.update({"sasa.probe.weight": torch.ones(tiny.HIDDEN + 1)})),
    "probe of shape (1, hidden)": of_tensors(
        lambda tensors: tensors.update({"sasa.probe.weight": torch.ones(1, tiny.HIDDEN)})
    ),
    "a tensor too many": of_tensors(lambda tensors: tensors.update({"sasa.other": torch.ones(3)})),
    "a weight missing": of_tensors(lambda tensors: tensors.pop(HEAD), holding=HEAD),
    "the original's file beside": overshadow,
    "half a shard": cut,
}

TAMPER = """
import json, sys
import torch
from transformers import AutoModelForImageTextToText
torch.set_num_threads(1)
found = {}
for name, directory in json.loads(sys.argv[1]).items():
    step = "load"
    try:
        model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True).eval()
        step = "forward"
        with torch.no_grad():
            output = model(input_ids=torch.tensor([[1, 65, 70, 75, 80, 85]]))
        guarded = getattr(output, "unsafe_probability", None) is not None
        found[name] = ["guarded" if guarded else "UNGUARDED", type(model).__name__]
    except Exception as error:
        found[name] = [step, type(error).__name__ + ": " + str(error)]
print("\\n" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def tampered(guard: Guards, fresh: Fresh, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """At which step each tampered directory failed, and the error."""
    root = tmp_path_factory.mktemp("tampered")
    jobs = {}
    for number, (name, edit) in enumerate({**TAMPERED, "nothing": lambda directory: None}.items()):
        # A name of its own for each, since code is cached by the directory's name.
        jobs[name] = str(root / f"case{number}")
        shutil.copytree(guard("llava").directory, jobs[name])
        edit(Path(jobs[name]))
    return {name: tuple(outcome) for name, outcome in fresh(TAMPER, jobs).items()}


def test_untampered_loads(tampered: dict[str, tuple[str, str]]) -> None:
    assert tampered["nothing"] == ("guarded", "SasaLlavaForConditionalGeneration")


@pytest.mark.parametrize("name", TAMPERED)
def test_tampered_fails(tampered: dict[str, tuple[str, str]], name: str) -> None:
    """An incomplete or edited directory is an error when it is loaded, and that says something."""
    step, error = tampered[name]
    note("artefact", group="tampering", what=name, good=step == "load", tried=1, says=error)
    assert step == "load", f"{step}: {error}"
    assert len(error.partition(": ")[2]) > 10, error


def test_tampered_errors_name_the_cause(tampered: dict[str, tuple[str, str]]) -> None:
    """What is missing or too much is named."""
    for name, words in {
        "no settings": "sasa",
        "another format": "format",
        "threshold 2": "threshold",
        "no refusal": "refusal",
        "no gate": "gate",
        "no probe weight": "sasa.probe.weight",
        "no probe bias": "sasa.probe.bias",
        "probe not in the index": "sasa.probe",
        "the original's file beside": "sasa.probe",
        "a tensor too many": "sasa.other",
        "a weight missing": "lm_head.weight",
        "zero probe": "sasa.probe",
        "NaN probe": "sasa.probe",
        "NaN bias": "sasa.probe",
        "stock model type": SEAL,
    }.items():
        assert words in tampered[name][1], (name, tampered[name])


@pytest.mark.parametrize("version", ["4.57.1", "6.0.0"])
def test_another_major_version_of_transformers(guard: Guards, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """The modeling file refuses a transformers that it was not written for, and says which one it needs."""
    source = (guard("llava").directory / "modeling_sasa.py").read_text()
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ImportError, match=r"transformers 5.*" + version.replace(".", r"\.")):
        exec(compile(source, "modeling_sasa.py", "exec"), {"__name__": "modeling_sasa"})


# ------------------------------------------------------------------------------------ processors, registering

PROCESSORS = """
import builtins, json, sys
directories, model_first = json.loads(sys.argv[1])
asked = []
def answer(prompt=""):
    asked.append(prompt)
    raise EOFError
builtins.input = answer
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
found = []
for directory in directories:
    if model_first:
        AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True)
    processor, tokenizer = AutoProcessor.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    found.append([type(processor).__name__, type(tokenizer).__name__, type(processor.image_processor).__name__])
print("\\n" + json.dumps([found, len(asked)]))
"""


@pytest.mark.parametrize("model_first", [True, False], ids=["model-first", "processor-first"])
def test_processors(guard: Guards, fresh: Fresh, model_first: bool) -> None:
    """The directory gives the original's processor and tokenizer; behind the model it asks nothing."""
    guards = [guard(family) for family in tiny.FAMILIES]
    found, asked = fresh(PROCESSORS, [[str(guarded.directory) for guarded in guards], model_first])
    for guarded, names in zip(guards, found, strict=True):
        processor: Any = guarded.processor
        parts = (processor, processor.tokenizer, processor.image_processor)
        assert names == [type(part).__name__ for part in parts]
    if model_first:
        assert asked == 0


REGISTERED = """
import builtins, json, sys
directories, order = json.loads(sys.argv[1])
builtins.input = None
if order == "ours-first":
    import sasa_export
    from transformers import AutoModelForImageTextToText, AutoProcessor
else:
    from transformers import AutoModelForImageTextToText, AutoProcessor
    import sasa_export
import torch
found = []
for directory in directories:
    processor = AutoProcessor.from_pretrained(directory)
    model = AutoModelForImageTextToText.from_pretrained(directory).eval()
    with torch.no_grad():
        output = model(input_ids=torch.tensor([[65, 70, 75, 80, 85]]))
    found.append([type(processor).__name__, type(model).__name__, output.unsafe_probability.tolist()])
print("\\n" + json.dumps(found))
"""


@pytest.mark.parametrize("order", ["ours-first", "transformers-first"])
def test_importing_the_tool_registers_the_types(guard: Guards, fresh: Fresh, order: str) -> None:
    """Where sasa_export is imported, plain `from_pretrained` gives guarded models, and nothing is asked."""
    guards = [guard(family) for family in tiny.FAMILIES]
    found = fresh(REGISTERED, [[str(guarded.directory) for guarded in guards], order])
    for guarded, (processor, model, probability) in zip(guards, found, strict=True):
        assert processor == type(guarded.processor).__name__
        assert model == f"Sasa{type(guarded.stock).__name__}"
        with torch.no_grad():
            expected = guarded.model(input_ids=torch.tensor([[65, 70, 75, 80, 85]])).unsafe_probability
        torch.testing.assert_close(torch.tensor(probability), expected, rtol=0.0, atol=1e-6)


# ------------------------------------------------------------------------------------ behind the head


class Capped(LlavaForConditionalGeneration):
    """LLaVA with a soft cap on its logits, as some Gemma models have."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits / CAP) * CAP  # (batch, kept, vocabulary)
        return output


@pytest.fixture(scope="module")
def capped(tiny_model: Callable[..., Path]) -> Capped:
    return Capped.from_pretrained(tiny_model("llava")).eval()


def test_a_soft_cap_is_seen(capped: Capped, stock: Callable[..., tuple[Any, Any]]) -> None:
    """The trace reports what follows the head, and nothing where nothing does."""
    ids = {"input_ids": torch.ones(1, 5, dtype=torch.long)}
    family = family_of("llava")
    assert trace(capped, family, ids).of("after_head")
    assert not trace(stock("llava")[0], family, ids).of("after_head")


def test_a_soft_cap_needs_its_number(capped: Capped) -> None:
    """A change behind the head that the configuration does not name cannot be rewritten."""
    graph = trace(capped, family_of("llava"), {"input_ids": torch.ones(1, 5, dtype=torch.long)})
    with pytest.raises(RewriteError, match="after_head"):
        rewrite(graph, LaneSettings(2, 4))


@pytest.mark.parametrize("padding_side", ["left", "right"])
@torch.no_grad()
def test_the_probe_reads_capped_logits(
    capped: Capped, stock: Callable[..., tuple[Any, Any]], padding_side: Any
) -> None:
    """The lane then has a head and the cap, and scores as the oracle does on capped logits."""
    graph = trace(capped, family_of("llava"), {"input_ids": torch.ones(1, 5, dtype=torch.long)})
    nodes = rewrite(graph, LaneSettings(2, 4, softcap=CAP))
    assert len(nodes.of("lane_head")) == 1
    assert nodes["sasa.gate"].inputs[0] == "after_head"
    size = capped.config.text_config.vocab_size
    weight = torch.randn(size, generator=torch.Generator().manual_seed(1)) / 10  # (vocabulary,)
    capped.sasa = nn.Module()
    capped.sasa.probe = Probe(size)
    capped.sasa.probe.weight.copy_(weight)
    capped.sasa.probe.bias.fill_(0.2)
    inputs = tiny.prompts(stock("llava")[1], images=True, count=4, seed=1, padding_side=padding_side)
    handles = watch(capped, nodes.to_json())
    try:
        with recording() as seen:
            capped(**inputs)
        values = run_graph(capped, nodes.to_json(), seen, oracle.last_positions(inputs), inputs["attention_mask"] > 0)
    finally:
        for handle in handles:
            handle.remove()
    logits = oracle.oracle_logits(capped, inputs, 2, 4)  # (batch, vocabulary)
    assert logits.abs().max() <= CAP
    expected = oracle.unsafe_probability(logits, weight, 0.2)  # (batch,)
    assert (values["sasa.probe"] - expected).abs().max() <= 1e-5
    plain = oracle.oracle_logits(stock("llava")[0], inputs, 2, 4)  # (batch, vocabulary)
    uncapped = oracle.unsafe_probability(plain, weight, 0.2)  # (batch,)
    assert (expected - uncapped).abs().max() > 1e-3, "the cap should matter"
