"""The Guard of `runtime/`, exported as a graph that knows no decoder: in place of blocks it has one placeholder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from sasa_export.probe.fit import Probe
from sasa_export.runtime.guard import Guard
from sasa_export.runtime.lane import Recording, watch
from sasa_export.runtime.ledger import Ledger
from sasa_export.writers.onnx.convert import convert
from sasa_export.writers.onnx.decoder import Shape, Signature
from sasa_export.writers.onnx.guard import for_export

OPSET = 18  # of the guard's nodes, which mean the same in every later one
PLACEHOLDERS = "sasa"  # the domain of the nodes that the decoder's own take the place of: Lane and Head
LOGITS = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}


@dataclass(frozen=True)
class Interface:
    """What a decoder shows its guard.

    `heads` and `size` are those of each layer of its cache, `axes` those of a position, None where the decoder takes no
    positions; `vocabulary` is how many logits there are. `rows` are the embeddings of the template's tokens, (numbers,
    hidden), None where the decoder reads token ids. `linear` as `Blocks` has it.
    """

    blocks: int
    hidden: int
    vocabulary: int
    heads: int
    size: int
    axes: int | None
    cache: str
    logits: ir.DataType | None
    rows: torch.Tensor | None
    linear: bool

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.blocks, self.heads, self.size, self.hidden, self.axes or 1)

    def added(self) -> list[str]:
        """Names of what the ledger adds to the cache, behind past_key_values or present."""
        layers = range(self.blocks, self.blocks + self.ledger.layers)
        return [f"{layer}.{kind}" for layer in layers for kind in ("key", "value")]


def guard_graph(sasa: dict[str, Any], interface: Interface, probe: Probe) -> ir.Model:
    """The guard's graph: text, mask, positions, logits, both taps and the ledger to logits, what the ledger keeps of
    the call's tokens, P(unsafe), and whether a verdict is due."""
    module = _Around(sasa, interface, probe).eval()
    signature = module.signature()
    return convert(module, module.example(signature), signature, opset=OPSET)


class _Lane(nn.Module):
    """Blocks behind the safety layer and the final norm, over a context (batch, context, hidden)."""

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        given, shape = (hidden_states, position_ids), hidden_states.shape
        return torch.onnx.ops.symbolic(f"{PLACEHOLDERS}::Lane", given, dtype=torch.float32, shape=shape, version=1)


class _Head(nn.Module):
    """Logits (batch, vocabulary) of normed states (batch, hidden)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        shape = (state.shape[0], self.vocabulary)
        return torch.onnx.ops.symbolic(f"{PLACEHOLDERS}::Head", (state,), dtype=torch.float32, shape=shape, version=1)


class _Decoder(nn.Module):
    """Hands to its one block what the second lane needs of a context."""

    def __init__(self) -> None:
        super().__init__()
        self.lane = _Lane()

    def forward(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, use_cache: bool
    ) -> torch.Tensor:
        return self.lane(inputs_embeds, position_ids=position_ids)


class _Kept(DynamicLayer):
    """A layer of the ledger, whose runtime's buffer is longer than what it holds: it gives what is new alone."""

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
        self.interface, self.decoder, self.norm = interface, _Decoder(), nn.Identity()
        self.head = _Head(interface.vocabulary)
        graph = _graph(sasa["epsilon"], interface.linear)
        self.sasa = Guard({**sasa, "graph": graph}, interface.ledger._replace(first=1), len(probe.weight))
        self.sasa.probe.weight.data = torch.from_numpy(probe.weight).float()
        self.sasa.probe.bias.data = torch.tensor(probe.bias)
        watch(self, graph)
        for_export(self)

    def get_input_embeddings(self) -> Any:
        return lambda ids: self.interface.rows  # it is asked for the template's tokens alone

    def forward(
        self,
        text: torch.Tensor,
        attention_mask: torch.Tensor,
        positions: list[torch.Tensor],
        logits: torch.Tensor,
        taps: list[torch.Tensor],
        kept: list[torch.Tensor],
    ) -> tuple[Any, ...]:
        cache = DynamicCache()
        seen = attention_mask[:, None, :, None].float()  # what the decoder's own layers hold after the call
        layers = [_Kept(*pair) for pair in zip(kept[::2], kept[1::2], strict=True)]
        cache.layers.extend([_Kept(seen, seen), *layers])
        recording = Recording(outputs=dict(zip(("safety", "semantic"), taps, strict=True)))
        recording.position_ids = positions[0] if positions else None
        name = "input_ids" if self.interface.rows is None else "inputs_embeds"
        last = torch.arange(text.shape[1] - logits.shape[1], text.shape[1])  # the tokens that have logits
        kwargs = {name: text, "attention_mask": attention_mask, "logits_to_keep": last}
        output = self.sasa(self, kwargs, recording, CausalLMOutputWithPast(logits=logits, past_key_values=cache))
        present = [tensor.to(kept[0].dtype) for layer in layers for tensor in layer.new]
        return output["logits"], present, output["unsafe_probability"], output["is_due"]

    def signature(self) -> Signature:
        found, tokens = self.interface, ("batch_size", "sequence_length")
        axes: Shape = () if found.axes in (None, 1) else (found.axes,)
        states: Shape = (*tokens, found.hidden)
        held: dict[str, Shape] = {
            f"past_key_values.{name}": ("batch_size", found.heads, "past_sequence_length", found.size)
            for name in found.added()
        }
        logits: Shape = ("batch_size", "kept_sequence_length", found.vocabulary)
        inputs: dict[str, Shape] = {
            "text": tokens if found.rows is None else states,
            "attention_mask": ("batch_size", "total_sequence_length"),
            **({} if found.axes is None else {"position_ids": (*axes, *tokens)}),
            "logits": logits, "safety": states, "semantic": states, **held,
        }  # fmt: skip
        new: Shape = ("batch_size", found.heads, "sequence_length", found.size)
        present = {f"present.{name}": new for name in found.added()}
        return Signature(inputs, {"logits": logits, **present, "unsafe_probability": ("batch_size",), "is_due": ()})

    def example(self, signature: Signature) -> tuple[Any, ...]:
        """Arguments to trace with: no two dimensions are alike."""
        sizes = {
            "batch_size": 2, "sequence_length": 5, "past_sequence_length": 7, "total_sequence_length": 12,
            "kept_sequence_length": 3,
        }  # fmt: skip
        made = {
            name: torch.ones([sizes[size] if isinstance(size, str) else size for size in shape])
            for name, shape in signature.inputs.items()
        }
        text, mask = made.pop("text"), made.pop("attention_mask").long()
        positions = [made.pop("position_ids").long()] if "position_ids" in made else []
        logits = made.pop("logits").to(LOGITS[self.interface.logits or ir.DataType.FLOAT])
        taps = [made.pop("safety"), made.pop("semantic")]
        kept = [value.to(getattr(torch, self.interface.cache)) for value in made.values()]
        return text.long() if self.interface.rows is None else text, mask, positions, logits, taps, kept


def _graph(epsilon: float, linear: bool) -> list[dict[str, Any]]:
    """The guard's own steps, with one block in place of all."""
    end = "norm" if linear else "head"
    return [
        {"name": "safety", "op": "tap", "inputs": [], "module": "safety"},
        {"name": "semantic", "op": "tap", "inputs": [], "module": "semantic"},
        {"name": "block", "op": "block", "inputs": [], "module": "decoder.lane"},
        {"name": "projection", "op": "projection", "inputs": ["safety", "semantic"], "epsilon": epsilon},
        {"name": "lane", "op": "lane_block", "inputs": ["projection"], "module": "decoder.lane"},
        {"name": "norm", "op": "lane_norm", "inputs": ["lane"], "module": "norm"},
        *([] if linear else [{"name": "head", "op": "lane_head", "inputs": ["norm"], "module": "head"}]),
        {"name": "probe", "op": "probe", "inputs": [end], "module": "sasa.probe"},
        {"name": "gate", "op": "gate", "inputs": ["probe"]},
    ]
