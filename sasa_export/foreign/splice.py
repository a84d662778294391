"""The guard's graph spliced into a decoder's: second lane for its placeholder, ledger in the cache, one `If`."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from sasa_export.errors import EmitError
from sasa_export.foreign.blocks import Blocks
from sasa_export.foreign.decoder import Decoder
from sasa_export.foreign.guard import OPSET, PLACEHOLDERS, Interface, guard_graph
from sasa_export.foreign.lane import LANE, Builder, add_head, add_lane
from sasa_export.probe.fit import Probe
from sasa_export.runtime.lane import TYPES
from sasa_export.runtime.ledger import Ledger
from sasa_export.runtime.verdict import TemplateTokens
from sasa_export.verify.fresh.onnx_model import embed, session
from sasa_export.writers.onnx.passes.branch import run_where

GATE = "/sasa/gate"
FAR = 2**62  # the end of any axis
LOGITS = {ir.DataType.FLOAT16: torch.float16, ir.DataType.BFLOAT16: torch.bfloat16}  # else float32

Values = dict[str, ir.Value]


def guarded_decoder(decoder: Decoder, sasa: dict[str, Any], probe: Probe) -> tuple[ir.Model, Ledger]:
    """The decoder's graph with the gate in it, and the shape of the ledger. EmitError where it cannot be made."""
    graphs, sizes, blocks = decoder.graphs, decoder.sizes, decoder.blocks()
    if blocks.model.opset_imports[""] < OPSET:
        raise EmitError(
            f"{graphs.decoder} is of an opset below {OPSET}, which the gate needs. Export it at a later one."
        )
    positions = blocks.inputs.get("position_ids")
    shape = [] if positions is None else list(positions.shape or ())
    axes = None if positions is None else 3 if len(shape) == 3 else 1  # three with M-RoPE
    rows = None
    if "embedding" in graphs.files:  # as it is deployed: rounding moves the rows by more than they may be off
        table = np.array([TemplateTokens.of(sasa).table])  # (1, numbers)
        embedding = session(graphs.source.directory / graphs.files["embedding"], "cpu")
        rows = torch.from_numpy(embed(embedding, table)[0]).float()  # (numbers, hidden)
    _, heads, _, size = blocks.sizes(blocks.key)
    ledger = Ledger(sizes.blocks, heads, size, sizes.hidden, axes or 1)
    cache, logits = getattr(torch, decoder.dtype), LOGITS.get(blocks.logits.dtype, torch.float32)  # type: ignore[arg-type]
    types = next((name for name in TYPES if name in blocks.inputs), None)
    interface = Interface(ledger, sizes.vocabulary, axes, cache, logits, rows, decoder.linear, types)
    splice(blocks, guard_graph(sasa, interface, probe), interface, (sasa["safety_layer"], sasa["semantic_layer"]))
    return blocks.model, ledger


def splice(blocks: Blocks, guard: ir.Model, interface: Interface, pair: tuple[int, int]) -> None:
    """Make a decoder's graph a guarded one; its weights stay where they are."""
    graph, add = blocks.model.graph, Builder(blocks.model.graph, GATE)
    given, made = ({str(value.name): value for value in values} for values in (guard.graph.inputs, guard.graph.outputs))
    place = list(graph.outputs).index(blocks.logits)
    blocks.logits.name, nodes = "sasa.logits", _take(guard.graph, graph)
    bound = {**blocks.inputs, "text": blocks.text, "logits": blocks.logits, **add_ledger(blocks, interface, made)}
    bound |= {name: blocks.states[index] for name, index in zip(("safety", "semantic"), pair, strict=True)}
    if interface.types:  # a runtime may leave it out, and then it is one number
        bound[interface.types] = add("Expand", bound[interface.types], add("Shape", blocks.text, start=0, end=2))
    for name, value in given.items():
        same = bound[name].dtype == value.dtype
        value.replace_all_uses_with(bound[name] if same else add("Cast", bound[name], to=value.dtype))
    graph.extend(nodes)
    for node in [node for node in nodes if node.domain == PLACEHOLDERS]:
        states = node.inputs[0]
        assert states is not None
        names = ("position_ids", "attention_mask", interface.types)  # of what the lane is given behind its states
        more = {name: value for name, value in zip(names, node.inputs[1:], strict=False) if name and value is not None}
        if node.op_type == "Norm":
            end = add_lane(blocks, len(blocks.states) - 1, states, prefix=f"{LANE}/{node.name}")  # the norm alone
        else:
            end = add_lane(blocks, pair[0], states, more) if node.op_type == "Lane" else add_head(blocks, states)
        node.outputs[0].replace_all_uses_with(add("Cast", end, to=ir.DataType.FLOAT))
        graph.remove(node, safe=True)
    graph.outputs[place] = made["logits"]
    graph.outputs.extend([made["unsafe_probability"], made["is_due"]])
    graph.sort()
    common.RemoveUnusedNodesPass()(blocks.model)
    run_where(blocks.model, LANE, result="unsafe_probability", fill=float("nan"), predicate="is_due")


def _take(guard: ir.Graph, graph: ir.Graph) -> list[ir.Node]:
    """The guard's nodes, out of their graph, and under names that are nobody else's; its constants are the graph's."""
    nodes, constants = list(guard), list(guard.initializers.values())
    kept = {value.name for value in guard.outputs}
    guard.outputs.clear()
    guard.inputs.clear()
    guard.remove(nodes)
    guard.initializers.clear()
    for value in constants:
        value.name = f"sasa.{value.name}"
        graph.register_initializer(value)
    for number, node in enumerate(nodes):
        node.name = f"{GATE}/{number}/{node.op_type}"
        for value in node.outputs:
            value.name = value.name if value.name in kept else f"sasa.{number}.{value.name}"
    return nodes


def add_ledger(blocks: Blocks, interface: Interface, made: Values) -> Values:
    """Add the ledger's layers to the cache, and give what they hold of earlier tokens.

    A runtime may hand in buffers that are longer than that, and expects them back as long (onnxruntime-genai).
    """
    graph, add, found = blocks.model.graph, Builder(blocks.model.graph, "/sasa/ledger"), Values()
    whole, new = (add("Shape", value, start=1, end=2) for value in (blocks.inputs["attention_mask"], blocks.text))
    like = blocks.key
    zero, far, axis, seen = add.constant([0]), add.constant([FAR]), add.constant([2]), add("Sub", whole, new)
    for name in interface.added():
        past, present = ir.Value(name=f"past_key_values.{name}"), made[f"present.{name}"]
        past.type, past.shape, present.name = like.type, like.shape, f"sasa.present.{name}"
        graph.inputs.append(past)
        held, rest = add("Slice", past, zero, seen, axis), add("Slice", past, whole, far, axis)
        after = add("Concat", held, present, rest, axis=2)
        after.name, after.type, held.type = f"present.{name}", like.type, like.type
        sizes = list(like.shape or ())
        after.shape = ir.Shape([sizes[0], sizes[1], "total_sequence_length", sizes[3]])
        graph.outputs.append(after)
        found[str(past.name)] = held
    return found
