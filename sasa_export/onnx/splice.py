"""Splices the guard's graph into a decoder's: lane and head for placeholders, the ledger in the cache, one `If`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from sasa_export.errors import EmitError
from sasa_export.gate import GateSpec
from sasa_export.onnx.blocks import Blocks
from sasa_export.onnx.branch import judge_where_due
from sasa_export.onnx.decoder import DTYPES, Decoder
from sasa_export.onnx.guard import OPSET, PLACEHOLDERS, Interface, Witness, guard_graph
from sasa_export.onnx.lane import LANE, Builder, add_head, add_lane
from sasa_export.onnx.run import embed, session
from sasa_export.probe.fit import Probe
from sasa_export.runtime.lane import TYPES
from sasa_export.runtime.ledger import Ledger
from sasa_export.runtime.verdict import TemplateTokens

GATE = "/sasa/gate"
FAR = 2**62  # behind the end of any axis

Values = dict[str, ir.Value]


def guarded_decoder(decoder: Decoder, gate: GateSpec, probe: Probe, witness: Witness | None = None) -> ir.Model:
    """Return the decoder's graph with the gate in it. Raise EmitError where its opset is too old."""
    graphs, sizes, blocks = decoder.graphs, decoder.sizes, decoder.blocks()
    if blocks.model.opset_imports[""] < OPSET:
        raise EmitError(
            f"{graphs.decoder} is of an opset below {OPSET}, which the gate needs. Export it at a later one."
        )
    positions = blocks.inputs.get("position_ids")
    shape = [] if positions is None else list(positions.shape or ())
    axes = None if positions is None else 3 if len(shape) == 3 else 1  # three with M-RoPE
    rows = None
    if "embedding" in graphs.files:  # from the deployed graph, whose rounding exceeds the tolerance
        table = np.array([TemplateTokens.of(gate.to_json()).table])  # (1, numbers)
        embedding = session(graphs.source.directory / graphs.files["embedding"], "cpu")
        rows = torch.from_numpy(embed(embedding, table)[0, :, : sizes.hidden]).float()  # (numbers, hidden)
    _, heads, _, size = blocks.sizes(blocks.key)
    ledger = Ledger(sizes.blocks, heads, size, sizes.hidden, axes or 1)
    cache, logits = (getattr(torch, DTYPES.get(value.dtype, "float32")) for value in (blocks.key, blocks.logits))  # type: ignore[arg-type]
    types = next((name for name in TYPES if name in blocks.inputs), None)
    taps = {node["of"]: node["index"] for node in gate.graph if node["op"] == "tap"}
    interface = Interface(ledger, sizes.vocabulary, taps, axes, cache, logits, rows, types, witness)
    splice(blocks, guard_graph(gate, interface, probe), interface)
    return blocks.model


def splice(blocks: Blocks, guard: ir.Model, interface: Interface) -> None:
    """Put the guard into a decoder's graph, in place. Its weights stay where they are."""
    graph, add = blocks.model.graph, Builder(blocks.model.graph, f"{GATE}/given")
    given, made = ({str(value.name): value for value in values} for values in (guard.graph.inputs, guard.graph.outputs))
    place = list(graph.outputs).index(blocks.logits)
    blocks.logits.name, nodes = "sasa.logits", _take(guard.graph, graph)
    bound = {**blocks.inputs, "text": blocks.text, "logits": blocks.logits, **add_ledger(blocks, interface, made)}
    bound |= {name: blocks.states[index] for name, index in interface.taps.items()}
    if blocks.width > interface.ledger.hidden:  # features that blocks add follow the embedding
        ends = (add.constant([number]) for number in (0, interface.ledger.hidden, 2))
        bound["text"] = add("Slice", blocks.text, *ends)
    if interface.types:  # a runtime may leave it out; its default is one number
        bound[interface.types] = add("Expand", bound[interface.types], add("Shape", blocks.text, start=0, end=2))
    for name, value in given.items():
        same = bound[name].dtype == value.dtype
        value.replace_all_uses_with(bound[name] if same else add("Cast", bound[name], to=value.dtype))
    graph.extend(nodes)
    for node in [node for node in nodes if node.domain == PLACEHOLDERS]:
        states = node.inputs[0]
        assert states is not None
        names = ("position_ids", "attention_mask", interface.types)  # the lane's inputs after its states
        more = {name: value for name, value in zip(names, node.inputs[1:], strict=False) if name and value is not None}
        last, prefix = len(blocks.states) - 1, str(node.name).replace(GATE, LANE)
        if node.op_type == "Norm":
            end = add_lane(blocks, last, states, prefix=prefix)  # the norm alone
        elif node.op_type == "Lane":
            end = add_lane(blocks, interface.taps["safety"], states, more)
        else:
            end = add_head(blocks, states)
        node.outputs[0].replace_all_uses_with(add("Cast", end, to=ir.DataType.FLOAT))
        graph.remove(node, safe=True)
    if made["logits"] is given["logits"]:  # a gate that observes touches no logits
        blocks.logits.name = "logits"
    else:
        made["logits"].shape = blocks.logits.shape  # onnxruntime-genai allocates logits by it
        graph.outputs[place] = made["logits"]
    graph.outputs.extend([made["unsafe_probability"], made["is_due"]])
    graph.sort()
    common.RemoveUnusedNodesPass()(blocks.model)
    judge_where_due(graph, LANE)


def _take(guard: ir.Graph, graph: ir.Graph) -> list[ir.Node]:
    """Take the guard's nodes out of their graph, and return them with unique names. `graph` gets the constants."""
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
        for value in node.outputs:
            value.name = value.name if value.name in kept else f"sasa.{number}.{value.name}"
    return nodes


def add_ledger(blocks: Blocks, interface: Interface, made: Values) -> Values:
    """Add the ledger's layers to the cache, and return their entries for earlier tokens.

    A runtime may pass buffers that are longer than the past, and expects the same length back (onnxruntime-genai).
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
