"""What a trace sees of a decoder, on tiny models of every family and on models that are not as described."""

import itertools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import PreTrainedModel, ProcessorMixin

from sasa_export.errors import RewriteError, TraceError
from sasa_export.graph import LayerGraph
from sasa_export.graph.rewrite import LaneSettings, rewrite
from sasa_export.graph.trace import trace, trace_source
from sasa_export.models import open_source
from sasa_export.models.family import families, family_of
from sasa_export.models.load import load_processor
from sasa_export.models.shapes import skeleton

Tiny = Callable[..., Path]
Stock = Callable[..., tuple[PreTrainedModel, ProcessorMixin]]

BLOCKS = [f"layers.{index}" for index in range(tiny.LAYERS)]

every_family = pytest.mark.parametrize("family", tiny.FAMILIES)


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Remove the hooks at the end: the stock models are shared."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prompt(processor: ProcessorMixin, *, images: bool = False) -> dict[str, Any]:
    return dict(tiny.prompts(processor, images=images, count=1, seed=3, padding_side="left"))


def traced(stock: Stock, family: str = "llava", *, images: bool = False) -> LayerGraph:
    model, processor = stock(family)
    return trace(model, family_of(family), prompt(processor, images=images))


class Walk(torch.nn.ModuleList):
    """A list of blocks; the decoder's loop walks through what `change` makes of it."""

    def __init__(self, blocks: torch.nn.ModuleList, change: Callable[[list[Any]], list[Any]]) -> None:
        super().__init__(blocks)
        self.change = change

    def __getitem__(self, index: Any) -> Any:
        return self.change(list(self)) if isinstance(index, slice) else super().__getitem__(index)


# --------------------------------------------------------------------------------- models as described


@every_family
def test_the_graph_is_what_the_familys_file_says(tiny_model: Tiny, stock: Stock, family: str) -> None:
    """On text, with a picture, and on fake weights: a model is traced before its weights are loaded."""
    modules = family_of(family).modules
    blocks = [f"{modules['blocks']}.{index}" for index in range(tiny.LAYERS)]
    paths = [modules["vision"], modules["projector"], modules["embedding"], *blocks, modules["norm"], modules["head"]]
    source = open_source(str(tiny_model(family)))
    with skeleton(source) as model:
        assert all(parameter.is_meta for parameter in model.parameters())
        fake = trace(model, source.family, {"input_ids": torch.ones(1, 5, dtype=torch.long)})
    for graph in (traced(stock, family), traced(stock, family, images=True), fake):
        assert [node.name for node in graph] == ["vision", "projector", "embed", *BLOCKS, "norm", "head"]
        assert [node.module for node in graph] == paths
        assert all(node.inputs == (before.name,) for before, node in itertools.pairwise(graph.nodes[2:]))
        assert [node.attributes["index"] for node in graph.of("block")] == list(range(tiny.LAYERS))


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("graphs/*.toml")), ids=lambda path: path.stem)
def test_every_family_file_is_tried(path: Path) -> None:
    """A family's file without a tiny model to trace would be a claim that nobody has checked."""
    family = families()[path.stem]
    assert family.refused or set(family.model_types) <= set(tiny.MAKERS)


def test_a_picture_that_does_not_run(tiny_model: Tiny) -> None:
    """Said in one line: what it adds to the decoder is then not known."""
    source = open_source(str(tiny_model("llava")))
    processor = load_processor(source)
    processor.num_additional_image_tokens = 3  # two tokens more than there are features
    with pytest.raises(TraceError, match=r"a prompt with a picture cannot be run .*tokens.*restore them"):
        trace_source(source, processor)


# ------------------------------------------------------------------------------ additions between blocks


def adding(amount: float) -> Any:
    """A hook that adds to the hidden state on its way into a block."""

    def hook(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (args[0] + amount, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + amount}

    return hook


@pytest.mark.parametrize(
    ("family", "behind"), [("llava", 2), ("qwen2_5_vl", 2), ("smolvlm", 2), ("gemma3", 2), ("llava", 5)]
)
def test_an_addition_between_two_blocks_is_seen(stock: Stock, family: str, behind: int) -> None:
    """By identity, not by value: what adds nothing to this prompt may add something to the next."""
    model, modules = stock(family)[0], family_of(family).modules
    reader = "norm" if behind + 1 == tiny.LAYERS else f"layers.{behind + 1}"
    path, name = reader.replace("layers", modules["blocks"]), f"between.{behind}.{reader.removeprefix('layers.')}"
    block = model.get_submodule(modules.get(reader, path))
    with hooked(block.register_forward_pre_hook(adding(0.0), with_kwargs=True)):
        graph = traced(stock, family)
    (between,) = graph.of("between")
    assert (between.name, between.inputs, between.module) == (name, (f"layers.{behind}",), None)
    assert graph[reader].inputs == (name,) and graph.earliest_safety_layer() == behind + 1
    with pytest.raises(RewriteError, match=rf"{name}: .*Choose a later --safety-layer"):
        rewrite(graph, LaneSettings(2, 4))


@pytest.mark.parametrize("add", [torch.add, torch.Tensor.add_], ids=["anew", "in place"])
def test_an_addition_inside_the_decoders_loop_is_seen(
    stock: Stock, monkeypatch: pytest.MonkeyPatch, add: Callable[..., Any]
) -> None:
    """As deepstack does it: the decoder's own forward adds to the state behind a block, outside any module."""

    def change(blocks: list[Any]) -> list[Any]:
        return [*blocks[:2], lambda *args, **kwargs: add(blocks[2](*args, **kwargs), 1.0), *blocks[3:]]

    decoder = stock("llava")[0].get_submodule("model.language_model")
    monkeypatch.setitem(decoder._modules, "layers", Walk(decoder.layers, change))
    assert [node.name for node in traced(stock).of("between")] == ["between.2.3"]


def test_a_change_behind_the_head_is_seen(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    """That logits are only scaled, a family's file says, and is believed no further than the numbers show."""
    model, _ = stock("llava")
    forward, scaled = type(model).forward, replace(family_of("llava"), scaled_logits=True)
    inputs = {"input_ids": torch.ones(1, 5, dtype=torch.long)}
    for change, is_scaled in ((lambda logits: torch.tanh(logits / 3) * 3, False), (lambda logits: logits / 8, True)):

        def changing(self: Any, *args: Any, change: Any = change, **kwargs: Any) -> Any:
            output = forward(self, *args, **kwargs)
            output.logits = change(output.logits)
            return output

        monkeypatch.setattr(model, "forward", types.MethodType(changing, model))
        graph = trace(model, family_of("llava"), inputs)
        assert (graph.nodes[-1].name, graph.nodes[-1].inputs) == ("after_head", ("head",))
        assert bool(trace(model, scaled, inputs).of("after_head")) is not is_scaled
        with pytest.raises(RewriteError, match=r"after_head: .*final_logit_softcapping"):
            rewrite(graph, LaneSettings(1, 3))


LEFT = {"shared": {"keys": torch.ones(1)}, "experts": torch.ones(1, 5, dtype=torch.int32)}


@pytest.mark.parametrize("name", ["Tensor", *LEFT])
def test_what_another_block_leaves_for_a_block_is_seen(
    stock: Stock, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that needs it could not be replayed on another state alone; one that reads nothing of it could."""

    def hook(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if name in LEFT:
            return args, {**kwargs, name: LEFT[name]}
        kwargs.pop("attention_mask")
        return (*args, torch.zeros(1, 1, 1, 1)), kwargs

    block = stock("llava")[0].get_submodule("model.language_model.layers.3")
    own = block.forward
    with hooked(block.register_forward_pre_hook(hook, with_kwargs=True)):
        if name == "shared":
            traced(stock)
            reading = lambda *args, shared, **kwargs: own(*args, **kwargs) * shared.get("keys", 0)  # noqa: E731
            monkeypatch.setattr(block, "forward", reading)
        with pytest.raises(TraceError, match=rf"layers\.3 is given {name}"):
            traced(stock)


# ------------------------------------------------------------------------------ models not as described


@pytest.mark.parametrize(
    "role, path, said",
    [
        ("norm", "model.language_model.final_norm", r"no module model\.language_model\.final_norm \(norm\)"),
        ("blocks", "model.language_model", r"model\.language_model should be a list of 6 blocks"),
        ("blocks", "model.vision_tower.encoder.layers", r"should be a list of 6 blocks"),
        ("norm", "model.vision_tower.post_layernorm", r"model\.vision_tower\.post_layernorm should run as step 7"),
        ("embedding", "model.multi_modal_projector", r"model\.multi_modal_projector should run as step 0"),
        ("head", "model.vision_tower", r"model\.vision_tower should run as step 8"),
        # Only a prompt with a picture shows it.
        ("vision", "model.vision_tower.encoder.layers", r"\(vision\) should run once .*, and ran 0 times"),
        ("projector", "model.vision_tower.encoder.layers", r"\(projector\) should run once .*, and ran 0 times"),
    ],
)
def test_a_wrong_path_is_named(stock: Stock, role: str, path: str, said: str) -> None:
    (model, processor), family = stock("llava"), family_of("llava")
    with pytest.raises(TraceError, match=said):
        inputs = prompt(processor, images=role in ("vision", "projector"))
        trace(model, replace(family, modules={**family.modules, role: path}), inputs)


@pytest.mark.parametrize("order", [[0, 2, 1, 3, 4, 5], [0, 1, 2, 3, 4], [0, 1, 2, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 5]])
def test_blocks_that_do_not_run_once_each_in_their_order(
    stock: Stock, monkeypatch: pytest.MonkeyPatch, order: list[int]
) -> None:
    decoder = stock("llava")[0].get_submodule("model.language_model")
    walk = Walk(decoder.layers, lambda blocks: [blocks[index] for index in order])
    monkeypatch.setitem(decoder._modules, "layers", walk)
    with pytest.raises(TraceError, match=r"layers\.\d|norm"):
        traced(stock)
