"""Exports the Guard of `runtime/` as a graph without a decoder: placeholders stand for the lane, the norm and the head.

The graph contains every step, whatever the traced call needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from sasa_export.gate import GateSpec
from sasa_export.onnx.convert import convert
from sasa_export.onnx.decoder import SELF_TEST
from sasa_export.onnx.flat import Shape, Signature
from sasa_export.probe.features import watching
from sasa_export.probe.fit import Probe
from sasa_export.prompts.prompt import encode
from sasa_export.runtime.guard import Guard
from sasa_export.runtime.lane import Graph, Recording, current_recording, start, watch, within
from sasa_export.runtime.ledger import Ledger

OPSET = 18  # of the guard's nodes; no later opset changes their meaning
PLACEHOLDERS = "sasa"  # domain of the nodes that the decoder's own nodes replace: Lane, Norm and Head
NAMES = {"": "/sasa/gate", "sasa": "/sasa/gate", "sasa.probe": "/sasa/probe"}  # module -> prefix of its nodes' names
# Relative to the witness's norm. On smol-llava, float16 is 0.001 off, weights in blocks of 8 bits 0.012, 4 bits 0.19.
TOLERANCE = 0.005


@dataclass(frozen=True)
class Witness:
    """The projection at export time for the first token of every prompt, which attends to no other token. A graph
    compares it to detect changed weights. `state` and the token's `embedding` are (hidden,)."""

    state: torch.Tensor
    embedding: torch.Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, processor: Any, graph: Graph) -> Witness:
        """Return the witness of the exported stock model, in torch."""
        ids = encode(processor, [SELF_TEST])["input_ids"][:, :1]  # (1, 1)
        with watching(model, graph), within(current_recording, Recording()) as seen:
            model(input_ids=ids, use_cache=False)
        _, state, _ = start(graph, seen)  # (1, 1, hidden)
        return cls(state[0, 0].to(model.dtype).float(), model.get_input_embeddings()(ids)[0, 0].float())

    def look(self, projection: torch.Tensor, embeddings: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """Return the projection (batch, tokens, hidden). Rows whose first token's projection differs from export time
        become NaN, and are therefore refused.

        `embeddings` is (batch, tokens, hidden). `first`, (batch, tokens), marks each row's first token after padding.
        """
        known = first & (embeddings == self.embedding).all(-1)  # (batch, tokens)
        squares = (projection.float() - self.state).square().sum(-1)  # (batch, tokens)
        near = squares < TOLERANCE**2 * self.state.square().sum()
        changed = (known & ~near).any(-1)  # (batch,)
        return projection.masked_fill(changed[:, None, None], float("nan"))


@dataclass(frozen=True)
class Interface:
    """The values of a decoder that its guard reads.

    `taps` maps the guard's names to the blocks whose outputs it reads. `axes` is the number of axes of a position, None
    for a decoder without positions. `cache` and `logits` are types. `rows` are the embeddings of the template's
    tokens, (numbers, hidden), None where the decoder reads token ids. `types` names the input that marks the tokens
    of a picture, None for a decoder without it.
    """

    ledger: Ledger
    vocabulary: int
    taps: dict[str, int]
    axes: int | None
    cache: torch.dtype
    logits: torch.dtype
    rows: torch.Tensor | None
    types: str | None = None
    witness: Witness | None = None

    def added(self) -> list[str]:
        """Return the names of the ledger's cache entries, without the prefix past_key_values or present."""
        layers = range(self.ledger.first, self.ledger.first + self.ledger.layers)
        return [f"{layer}.{kind}" for layer in layers for kind in ("key", "value")]

    def signature(self) -> Signature:
        """Return the inputs and outputs of the guard's graph."""
        ledger, tokens = self.ledger, ("batch_size", "sequence_length")
        states, logits = (*tokens, ledger.hidden), ("batch_size", "kept_length", self.vocabulary)
        inputs: dict[str, Shape] = {"text": tokens if self.rows is None else states}
        inputs["attention_mask"] = ("batch_size", "total_sequence_length")
        if self.axes is not None:
            inputs["position_ids"] = tokens if self.axes == 1 else (self.axes, *tokens)
        if self.types:
            inputs[self.types] = tokens
        inputs |= {"logits": logits, **dict.fromkeys(self.taps, states)}
        outputs: dict[str, Shape] = {"logits": logits}
        for name in self.added():
            inputs[f"past_key_values.{name}"] = ("batch_size", ledger.heads, "past_sequence_length", ledger.size)
            outputs[f"present.{name}"] = ("batch_size", ledger.heads, "sequence_length", ledger.size)
        return Signature(inputs, outputs | {"unsafe_probability": ("batch_size",), "is_due": ()})


def guard_graph(gate: GateSpec, interface: Interface, probe: Probe) -> ir.Model:
    """Return the guard's graph. It reads logits and taps, and returns gated logits, the ledger's entries for the call's
    tokens (`present`), P(unsafe), and whether a verdict is due."""
    signature = interface.signature()
    types = {
        "logits": interface.logits,
        "past_key_values": interface.cache,
        **dict.fromkeys(interface.taps, torch.float32),
    }
    given = signature.example(types if interface.rows is None else {"text": torch.float32, **types})
    kept = [given.pop(name) for name in list(given) if name.startswith("past")]
    return convert(_Around(gate, interface, probe).eval(), (given, kept), signature, NAMES, opset=OPSET)


class _Placeholder(nn.Module):
    """A node with an output of the given width."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.name, self.width = f"{PLACEHOLDERS}::{name}", width

    def forward(self, hidden_states: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        given, shape = (hidden_states, *others.values()), (*hidden_states.shape[:-1], self.width)
        return torch.onnx.ops.symbolic(self.name, given, dtype=torch.float32, shape=shape, version=1)


class _Decoder(nn.Module):
    """Passes the second lane's inputs to its only block."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lane = _Placeholder("Lane", hidden)

    def forward(
        self, inputs_embeds: Any, attention_mask: Any, position_ids: Any, use_cache: bool, token_type_ids: Any
    ) -> Any:
        return self.lane(inputs_embeds, position_ids=position_ids, attention_mask=attention_mask, types=token_type_ids)


class _Kept(DynamicLayer):
    """A cache layer that returns only new entries. The runtime's buffer holds past and new ones."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.new = keys, values, (keys, values)
        self.is_initialized, self.dtype, self.device = True, keys.dtype, keys.device

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.new = (key_states, value_states)
        return self.new


class _Guard(Guard):
    """A guard that runs every step and logs nothing. A `witness`, if set, checks the weights."""

    witness: Witness | None = None

    def _any(self, flags: torch.Tensor) -> bool:
        return True

    def _read(self, model: Any, kwargs: dict[str, Any], *others: Any) -> Any:
        call, context = super()._read(model, kwargs, *others)
        if self.witness is not None:
            first = context.real & (context.real.cumsum(-1) == 1)  # (batch, context)
            first = first[:, -call.numbers.shape[1] :]  # (batch, tokens)
            seen = self.witness.look(context.projection, kwargs["inputs_embeds"], first)
            context = context._replace(projection=seen)
        return call, context

    def _judge(self, model: Any, context: Any, due: Any) -> torch.Tensor:
        found = super()._judge(model, context, due)
        if self.witness is None:
            return found
        # The witness may have marked an earlier call with NaN, at tokens that the lane does not reach.
        _, states = self.ledger.unpack(context.kept or self.ledger.empty(context.projection))
        lost = (states != states).sum((1, 2)) > 0  # (batch,); `any` over no tokens has no value in ONNX
        return found.masked_fill(lost, float("nan"))

    def _report(self, output: Any, call: Any, due: Any, held: torch.Tensor, request: Any) -> None:
        output["is_due"] = due.rows.any()  # () bool: the condition of the second lane's branch


class _Around(nn.Module):
    """A stand-in for the guarded model: a decoder with one placeholder block, and embeddings of the template."""

    def __init__(self, gate: GateSpec, interface: Interface, probe: Probe) -> None:
        super().__init__()
        ledger, self.interface = interface.ledger, interface
        self.decoder, self.norm = _Decoder(ledger.hidden), nn.Identity()  # the lane includes the norm
        self.head = _Placeholder("Head", interface.vocabulary)
        self.state = _Placeholder("Norm", ledger.hidden)
        graph = _steps([dict(node) for node in gate.graph])
        settings = SimpleNamespace(sasa={**gate.to_json(), "graph": graph})
        self.sasa = _Guard(settings, ledger._replace(first=1), len(probe.weight))
        self.sasa.probe.weight.data = torch.from_numpy(probe.weight).float()
        self.sasa.probe.bias.data = torch.tensor(probe.bias)
        self.sasa.witness = interface.witness
        watch(self, graph)

    def get_input_embeddings(self) -> Any:
        return lambda ids: self.interface.rows  # the guard asks only for the template's tokens

    def forward(self, given: dict[str, torch.Tensor], kept: list[torch.Tensor]) -> tuple[Any, ...]:
        text, attention_mask, logits = (given[name] for name in ("text", "attention_mask", "logits"))
        cache, seen = DynamicCache(), attention_mask[:, None, :, None].float()  # as long as the decoder's cache
        layers = [_Kept(*pair) for pair in zip(kept[::2], kept[1::2], strict=True)]
        cache.layers.extend([_Kept(seen, seen), *layers])
        recording = Recording(outputs={name: given[name] for name in self.interface.taps})
        recording.position_ids = given.get("position_ids")
        name = "input_ids" if self.interface.rows is None else "inputs_embeds"
        last = torch.arange(text.shape[1] - logits.shape[1], text.shape[1])  # the tokens that have logits
        kwargs = {name: text, "attention_mask": attention_mask, "logits_to_keep": last}
        if self.interface.types:
            kwargs["token_type_ids"] = given[self.interface.types]
        output = self.sasa(self, {**kwargs, "cache": cache}, recording, CausalLMOutputWithPast(logits=logits))
        present = [tensor.to(self.interface.cache) for layer in layers for tensor in layer.new]
        return output["logits"], present, output["unsafe_probability"], output["is_due"]


def _steps(graph: Graph) -> Graph:
    """Return the guard's steps outside the main lane. One block stands for all blocks, and the modules are the names of
    placeholders."""
    again = [node for node in graph if node["op"] == "lane_block"]
    modules = {"state_norm": "state", "lane_norm": "norm" if again else "state", "lane_head": "head"}
    steps: Graph = [{"name": "block", "op": "block", "inputs": [], "module": "decoder.lane"}]
    for node in graph:
        if node["op"] == "tap":
            steps.append({**node, "inputs": [], "module": node["of"]})
        elif node["op"] in modules:  # the decoder's own head caps its logits
            steps.append({**node, "module": modules[node["op"]], "softcap": None})
        elif node["op"] in ("projection", "join", "probe", "gate"):
            steps.append(node)
        elif again and node is again[-1]:
            steps.append({**node, "inputs": again[0]["inputs"], "module": "decoder.lane"})
    return steps
