"""Run a model once on a tiny input and observe its decoder as a graph of blocks."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import transformers
from PIL import Image
from torch import nn

from sasa_export.errors import TraceError, reworded
from sasa_export.graph import LayerGraph, Node
from sasa_export.models import Source
from sasa_export.models.family import Family
from sasa_export.models.shapes import skeleton
from sasa_export.runtime.lane import TYPES

KNOWN = ("attention_mask", "position_ids", "cache_position", *TYPES)  # integers that the second lane gets, too


class Shared(UserDict):
    """A mapping that blocks pass on to each other. `read` tells whether a block read an entry."""

    def __init__(self, held: Mapping) -> None:
        self.data, self.read = held, False  # type: ignore[assignment]

    def __getitem__(self, key: Any) -> Any:
        self.read = True
        return self.data[key]


@dataclass(frozen=True)
class Observed:
    """One call of a watched module, with the hidden states that entered and left it."""

    path: str
    entered: torch.Tensor | None
    left: torch.Tensor | None
    more: str  # other inputs, made from token ids or by another block; empty without any
    changes: tuple[int, int]  # how often each of the two states had been changed in place

    def follows(self, before: Observed) -> bool:
        """Return whether the input is the unchanged output of `before`. An equal copy may have had zeros added."""
        return self.entered is before.left and self.changes[0] == before.changes[1]


def trace(model: nn.Module, family: Family, inputs: dict[str, Any]) -> LayerGraph:
    """Observe the decoder of `model` in one forward pass and check it against its family's file.

    Args:
        model: a stock ...ForConditionalGeneration; on the meta device no weights are needed.
        inputs: keyword arguments of its forward: a short prompt, with a picture where there is one.

    Raises TraceError, which names the node, where the model differs from the family's file.
    """
    modules = _modules(model, family)
    calls, logits = _observe(model, modules, inputs)
    order = [call.path for call in calls]
    blocks = [path for path in modules if path.startswith(family.modules["blocks"] + ".")]
    expected = [family.modules["embedding"], *blocks, family.modules["norm"], family.modules["head"]]
    decoder = [path for path in order if path in expected]
    for position, (path, found) in enumerate(zip_longest(expected, decoder)):
        if path is None:
            raise TraceError(f"{found} runs twice in one pass; this decoder cannot be rewritten.")
        if found != path:
            raise TraceError(
                f"{path} should run as step {position} of the decoder, but {found or 'nothing'} does. "
                f"graphs/{family.name}.toml does not describe this model: correct its module paths."
            )
    for call in calls:
        if call.path in blocks and call.more:
            raise TraceError(
                f"{call.path} is given {call.more} beside its hidden state, which the model makes of token ids or in "
                "another block. The second lane would not have it, so this model cannot be guarded. Use another model."
            )
    if any(isinstance(value, torch.Tensor) and name.startswith("pixel") for name, value in inputs.items()):
        _check_vision(order, family)
    graph = _graph({call.path: call for call in calls}, expected, family)
    if logits is not calls[-1].left and not (family.scaled_logits and _scaled(calls[-1].left, logits)):
        # For example soft-capping. The probe must then read the model's final logits.
        graph = graph.add("after_head", "after_head")
    return graph


def trace_source(source: Source, processor: Any) -> LayerGraph:
    """Trace a source without its weights (shapes alone), on a text prompt and on a prompt with a picture.

    The graph holds what either prompt adds to the hidden state between blocks. Some decoders add picture features
    after their first blocks. Without a processor (None), only the text is traced, for inspection.

    Raises TraceError where a prompt does not run, or the model differs from the family's file.
    """
    said = (
        f"a prompt with a picture cannot be run through {source.name}, to see what it adds to the decoder "
        f"({{reason}}). transformers {transformers.__version__} may fail on this model: try another version. Or its "
        "processor and its config.json do not belong together: restore them from their source."
    )
    with reworded(TraceError, said):
        asked = None if processor is None else _prompt(processor, Image.new("RGB", (64, 64)))
        with skeleton(source) as model:
            text = trace(model, source.family, {"input_ids": torch.ones(1, 5, dtype=torch.long)})
            if asked is None:
                return text
            picture = trace(model, source.family, asked)
    most = max((text, picture), key=lambda graph: len(graph.of("between")))
    for graph in (text, picture):
        check_traces(most, graph)
    return most


def check_traces(expected: LayerGraph, observed: LayerGraph) -> None:
    """Raise TraceError where the decoder's steps differ from the expected, or it adds more between its blocks."""
    added = {node.name for node in expected.of("between")}
    blocks, found = ([node.name for node in graph if node.op != "between"] for graph in (expected, observed))
    differing = [name for name in (*blocks, *found) if (name in blocks) != (name in found)]
    differing += [node.name for node in observed.of("between") if node.name not in added]
    if differing or blocks != found:
        raise TraceError(
            f"{(differing or found)[0]}: with a picture, this model's decoder does not run as without one, or its "
            "weights do not run as their shapes do. It cannot be rewritten yet."
        )


def _prompt(processor: Any, image: Image.Image) -> dict[str, Any]:
    """Return the model inputs of a short prompt with a picture."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": "a question"}]
    chat = [[{"role": "user", "content": content}]]
    return dict(
        processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True,
            processor_kwargs={"return_tensors": "pt"},
        )
    )  # fmt: skip


def _check_vision(order: list[str], family: Family) -> None:
    """Raise TraceError unless vision tower and projector each run once, before the decoder."""
    first_block = order.index(f"{family.modules['blocks']}.0")
    for role in ("vision", "projector"):
        path = family.modules[role]
        if order.count(path) != 1 or order.index(path) > first_block:
            raise TraceError(
                f"{path} ({role}) should run once and before the decoder, and ran {order.count(path)} times. "
                f"graphs/{family.name}.toml does not describe this model: correct its module paths."
            )


def _modules(model: Any, family: Family) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for role, path in family.modules.items():
        try:
            found[path] = model.get_submodule(path)
        except AttributeError:
            raise TraceError(
                f"the model has no module {path} ({role}). graphs/{family.name}.toml does not describe it: "
                "correct its module paths."
            ) from None
    blocks = found.pop(family.modules["blocks"])
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    if not isinstance(blocks, nn.ModuleList) or len(blocks) != count:
        raise TraceError(f"{family.modules['blocks']} should be a list of {count} blocks, as the configuration says.")
    found.update((f"{family.modules['blocks']}.{index}", block) for index, block in enumerate(blocks))
    return found


def _observe(model: nn.Module, modules: dict[str, nn.Module], inputs: dict[str, Any]) -> tuple[list[Observed], Any]:
    """Run the model. Return all calls in order, and the logits."""
    calls: list[Observed] = []
    began: dict[str, int] = {}

    def begin(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            began[path] = _changes(args[0] if args else kwargs.get("hidden_states"))
            return args, {key: Shared(held) if isinstance(held, Mapping) else held for key, held in kwargs.items()}

        return hook

    def see(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            entered = args[0] if args else kwargs.get("hidden_states")
            left = output[0] if isinstance(output, tuple) else output
            calls.append(Observed(path, entered, left, _more(args, kwargs), (began[path], _changes(left))))

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for path, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(begin(path), with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(see(path), with_kwargs=True))
        return calls, model(**inputs, use_cache=False, return_dict=True).logits


def _scaled(head: Any, logits: torch.Tensor) -> bool:
    """Return whether the logits are the head's output times a number. The probe can then fold through the head.

    On the meta device there are no numbers to compare, and the family's file decides.
    """
    if head.is_meta:
        return True
    head, logits = head.float(), logits.float()
    scale = (head * logits).sum() / (head * head).sum()
    return torch.allclose(logits, scale * head, rtol=1e-2, atol=1e-4)


def _changes(state: Any) -> int:
    """Return how often a tensor was changed in place so far."""
    return int(state._version) if isinstance(state, torch.Tensor) else 0


def _more(args: tuple, kwargs: dict[str, Any]) -> str:
    """Name the inputs that the second lane cannot supply: a second positional input, entries of a mapping from other
    blocks, or unknown integers."""
    more = [type(value).__name__ for value in args[1:] if value is not None]
    for name, value in kwargs.items():
        integers = isinstance(value, torch.Tensor) and "int" in str(value.dtype) and name not in KNOWN
        if integers or (isinstance(value, Shared) and value.read):
            more.append(name)
    return ", ".join(more)


def _graph(calls: dict[str, Observed], expected: list[str], family: Family) -> LayerGraph:
    embedding, *blocks, norm, head = expected
    graph = LayerGraph((Node("vision", "vision", (), family.modules["vision"]),))
    graph = graph.add("projector", "projector", family.modules["projector"]).add("embed", "embed", embedding)
    for index, path in enumerate(blocks):
        graph = graph.add(f"layers.{index}", "block", path, index=index)
        name, following = (index + 1, blocks[index + 1]) if index + 1 < len(blocks) else ("norm", norm)
        if not calls[following].follows(calls[path]):
            graph = graph.add(f"between.{index}.{name}", "between")
    return graph.add("norm", "norm", norm).add("head", "head", head)
