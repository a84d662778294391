"""The Guard of `runtime/`, exported as a graph that knows no decoder: in place of blocks it has one placeholder."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from sasa_export.graph import lane_tokens
from sasa_export.probe.fit import Probe
from sasa_export.runtime.guard import Guard
from sasa_export.runtime.lane import Recording, watch
from sasa_export.runtime.ledger import Ledger
from sasa_export.writers.onnx.convert import convert
from sasa_export.writers.onnx.decoder import SIZES, Shape, Signature
from sasa_export.writers.onnx.guard import for_export

OPSET = 18  # of the guard's nodes, which mean the same in every later one
PLACEHOLDERS = "sasa"  # the domain of the nodes that the decoder's own take the place of: Lane, Norm and Head


@dataclass(frozen=True)
class Interface:
    """What a decoder shows its guard.

    `axes` are those of a position, None where the decoder takes no positions. `cache` and `logits` are types. `rows`
    are the embeddings of the template's tokens, (numbers, hidden), None where the decoder reads token ids. `linear` as
    `Blocks` has it. `types` is the input that tells a picture's tokens from text, None where there is none.
    """

    ledger: Ledger
    vocabulary: int
    axes: int | None
    cache: torch.dtype
    logits: torch.dtype
    rows: torch.Tensor | None
    linear: bool
    types: str | None = None

    def added(self) -> list[str]:
        """Names of what the ledger adds to the cache, behind past_key_values or present."""
        layers = range(self.ledger.first, self.ledger.first + self.ledger.layers)
        return [f"{layer}.{kind}" for layer in layers for kind in ("key", "value")]

    def inputs(self) -> dict[str, tuple[Shape, torch.dtype]]:
        """What the guard's graph reads, by name."""
        ledger, whole, tokens = self.ledger, torch.int64, ("batch_size", "sequence_length")
        states: tuple[Shape, torch.dtype] = ((*tokens, ledger.hidden), torch.float32)
        found: dict[str, tuple[Shape, torch.dtype]] = {"text": (tokens, whole) if self.rows is None else states}
        found["attention_mask"] = (("batch_size", "total_sequence_length"), whole)
        if self.axes is not None:
            found["position_ids"] = (tokens if self.axes == 1 else (self.axes, *tokens), whole)
        if self.types:
            found[self.types] = (tokens, whole)
        found["logits"] = (("batch_size", "kept_length", self.vocabulary), self.logits)
        found |= {"safety": states, "semantic": states}
        held: Shape = ("batch_size", ledger.heads, "past_sequence_length", ledger.size)
        return found | {f"past_key_values.{name}": (held, self.cache) for name in self.added()}


def guard_graph(sasa: dict[str, Any], interface: Interface, probe: Probe) -> ir.Model:
    """The guard's graph: logits and taps to logits, what the ledger keeps of the call's tokens (`present`), P(unsafe),
    and whether a verdict is due."""
    ledger, inputs = interface.ledger, interface.inputs()
    given = {
        name: torch.ones([SIZES[size] if isinstance(size, str) else size for size in shape], dtype=kind)
        for name, (shape, kind) in inputs.items()
    }
    kept = [given.pop(name) for name in list(given) if name.startswith("past")]
    new: Shape = ("batch_size", ledger.heads, "sequence_length", ledger.size)
    outputs: dict[str, Shape] = {"logits": inputs["logits"][0]}
    outputs |= {f"present.{name}": new for name in interface.added()}
    outputs |= {"unsafe_probability": ("batch_size",), "is_due": ()}
    signature = Signature({name: shape for name, (shape, _) in inputs.items()}, outputs)
    return convert(_Around(sasa, interface, probe).eval(), (given, kept), signature, opset=OPSET)


class _Placeholder(nn.Module):
    """A node whose output is as wide as is said."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.name, self.width = f"{PLACEHOLDERS}::{name}", width

    def forward(self, hidden_states: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        given, shape = (hidden_states, *others.values()), (*hidden_states.shape[:-1], self.width)
        return torch.onnx.ops.symbolic(self.name, given, dtype=torch.float32, shape=shape, version=1)


class _Decoder(nn.Module):
    """Hands to its one block what the second lane needs of a context."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lane = _Placeholder("Lane", hidden)

    def forward(
        self, inputs_embeds: Any, attention_mask: Any, position_ids: Any, use_cache: bool, token_type_ids: Any
    ) -> Any:
        return self.lane(inputs_embeds, position_ids=position_ids, attention_mask=attention_mask, types=token_type_ids)


class _Kept(DynamicLayer):
    """A layer of the cache that keeps what is new apart: it is the runtime's buffer that holds both."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.new = keys, values, (keys, values)
        self.is_initialized, self.dtype, self.device = True, keys.dtype, keys.device

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.new = (key_states, value_states)
        return self.new


class _Around(nn.Module):
    """The model that the guard believes to guard: it has a decoder of one block, and embeddings of the template."""

    def __init__(self, sasa: dict[str, Any], interface: Interface, probe: Probe) -> None:
        super().__init__()
        ledger, self.interface = interface.ledger, interface
        self.decoder, self.norm = _Decoder(ledger.hidden), nn.Identity()
        self.head = _Placeholder("Head", interface.vocabulary)
        self.state = _Placeholder("Norm", ledger.hidden)
        graph = _steps({"epsilon": sasa["epsilon"], "tokens": lane_tokens(sasa["graph"])}, interface.linear)
        config = SimpleNamespace(sasa={**sasa, "graph": graph})
        self.sasa = Guard(config, ledger._replace(first=1), len(probe.weight))
        self.sasa.probe.weight.data = torch.from_numpy(probe.weight).float()
        self.sasa.probe.bias.data = torch.tensor(probe.bias)
        watch(self, graph)
        for_export(self)

    def get_input_embeddings(self) -> Any:
        return lambda ids: self.interface.rows  # it is asked for the template's tokens alone

    def forward(self, given: dict[str, torch.Tensor], kept: list[torch.Tensor]) -> tuple[Any, ...]:
        text, attention_mask, logits = (given[name] for name in ("text", "attention_mask", "logits"))
        cache, seen = DynamicCache(), attention_mask[:, None, :, None].float()  # as many as the decoder's layers hold
        layers = [_Kept(*pair) for pair in zip(kept[::2], kept[1::2], strict=True)]
        cache.layers.extend([_Kept(seen, seen), *layers])
        recording = Recording(outputs={name: given[name] for name in ("safety", "semantic")})
        recording.position_ids = given.get("position_ids")
        name = "input_ids" if self.interface.rows is None else "inputs_embeds"
        last = torch.arange(text.shape[1] - logits.shape[1], text.shape[1])  # the tokens that have logits
        kwargs = {name: text, "attention_mask": attention_mask, "logits_to_keep": last}
        if self.interface.types:
            kwargs["token_type_ids"] = given[self.interface.types]
        output = self.sasa(self, kwargs, recording, CausalLMOutputWithPast(logits=logits, past_key_values=cache))
        present = [tensor.to(self.interface.cache) for layer in layers for tensor in layer.new]
        return output["logits"], present, output["unsafe_probability"], output["is_due"]


def _steps(settings: dict[str, Any], linear: bool) -> list[dict[str, Any]]:
    """The guard's own steps, with one block in place of all."""
    head = {"name": "head", "op": "lane_head", "inputs": ["norm"], "module": "head"}
    end, pair = "norm" if linear else "head", ("safety", "semantic")
    normed: list[dict[str, Any]] = [
        {"name": f"{of}.norm", "op": "state_norm", "inputs": [of], "module": "state"} for of in pair
    ]
    return [
        *({"name": name, "op": "tap", "inputs": [], "module": name} for name in pair),
        {"name": "block", "op": "block", "inputs": [], "module": "decoder.lane"},
        {"name": "projection", "op": "projection", "inputs": ["safety", "semantic"], **settings},
        {"name": "lane", "op": "lane_block", "inputs": ["projection"], "module": "decoder.lane"},
        {"name": "norm", "op": "lane_norm", "inputs": ["lane"], "module": "norm"},
        *([] if linear else [head]),
        *normed,
        {"name": "read", "op": "join", "inputs": [end, *(node["name"] for node in normed)]},
        {"name": "probe", "op": "probe", "inputs": ["read"], "module": "sasa.probe"},
        {"name": "gate", "op": "gate", "inputs": ["probe"], "module": "sasa"},
    ]
