"""The guard's graph spliced into a decoder's: second lane for its placeholder, ledger in the cache, one `If`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from sasa_export.errors import EmitError
from sasa_export.foreign.blocks import Blocks, output
from sasa_export.foreign.decoder import Decoder, load_blocks
from sasa_export.foreign.guard import OPSET, PLACEHOLDERS, Interface, guard_graph
from sasa_export.foreign.lane import LANE, Builder, add_head, add_lane
from sasa_export.probe.fit import Probe
from sasa_export.runtime.verdict import TemplateTokens
from sasa_export.verify.fresh.onnx_model import embed, session
from sasa_export.writers.onnx.passes.branch import run_where

GATE, LEDGER = "/sasa/gate", "/sasa/ledger"
FAR = 2**62  # the end of any axis


def guarded_decoder(
    decoder: Decoder, sasa: dict[str, Any], probe: Probe, pair: tuple[int, int]
) -> tuple[ir.Model, Interface]:
    """The decoder's graph with the gate in it, and what it shows the gate. EmitError where it cannot be made."""
    graphs, sizes, blocks = decoder.graphs, decoder.sizes, load_blocks(decoder.graphs)
    shape = next(value.shape for name, value in blocks.past.items() if name.endswith(".key"))
    positions = blocks.inputs.get("position_ids")
    rows = None
    if "embedding" in graphs.files:  # as it is deployed: rounding moves the rows by more than they may be off
        table = np.array([TemplateTokens.of(sasa).table])  # (1, numbers)
        embedding = session(graphs.source.directory / graphs.files["embedding"], "cpu")
        rows = torch.from_numpy(embed(embedding, table)[0]).float()  # (numbers, hidden)
    interface = Interface(
        sizes.blocks, sizes.hidden, sizes.vocabulary, shape[1], shape[3],
        axes=None if positions is None else 1 if len(positions.shape) == 2 else int(positions.shape[0]),
        cache=decoder.dtype, logits=blocks.logits.dtype, rows=rows, linear=decoder.linear,
    )  # fmt: skip
    splice(blocks, guard_graph(sasa, interface, probe), interface, pair)
    return blocks.model, interface


def splice(blocks: Blocks, guard: ir.Model, interface: Interface, pair: tuple[int, int]) -> None:
    """Make a decoder's graph a guarded one; its weights stay where they are."""
    graph = blocks.model.graph
    names = [str(value.name) for value in graph.outputs]
    opset = blocks.model.opset_imports[""]
    if opset < OPSET:
        raise EmitError(f"the decoder is of opset {opset}, and the gate needs {OPSET}. Export it at a later one.")
    add, given = Builder(graph, GATE), {str(value.name): value for value in guard.graph.inputs}
    made = {str(value.name): value for value in guard.graph.outputs}
    logits = blocks.logits
    logits.name, taken = "sasa.logits", _take(guard.graph, graph)
    states = (add("Cast", blocks.states[index], to=ir.DataType.FLOAT) for index in pair)
    bound = {"text": blocks.text, "logits": logits, **dict(zip(("safety", "semantic"), states, strict=True))}
    bound |= {name: blocks.inputs[name] for name in ("attention_mask", "position_ids") if name in given}
    bound |= {name: value for name, value in blocks.inputs.items() if name == "position_ids"}
    past = add_ledger(blocks, interface, given, made)
    for name, value in given.items():
        whole = past.get(name) or bound[name]
        wide = whole if whole.dtype == value.dtype else add("Cast", whole, to=value.dtype)
        value.replace_all_uses_with(wide)
    for node in taken:
        graph.append(node)
    _fill(blocks, taken, pair[0])
    graph.outputs[names.index("logits")] = made["logits"]
    graph.outputs.extend([made["unsafe_probability"], made["is_due"]])
    graph.sort()
    common.RemoveUnusedNodesPass()(blocks.model)
    run_where(blocks.model, LANE, result="unsafe_probability", fill=float("nan"), predicate="is_due")


def _take(guard: ir.Graph, graph: ir.Graph) -> list[ir.Node]:
    """The guard's nodes, out of their graph, and under names that are nobody else's; their constants move over."""
    nodes, constants = list(guard), list(guard.initializers.values())
    guard.outputs.clear()
    guard.inputs.clear()
    guard.remove(nodes)
    for value in constants:
        del guard.initializers[str(value.name)]
        value.name = f"sasa.{value.name}"
        graph.register_initializer(value)
    kept = {"logits", "unsafe_probability", "is_due"}
    for number, node in enumerate(nodes):
        node.name = f"{GATE}/{node.op_type}_{number}"
        for value in node.outputs:
            if value.name not in kept:
                value.name = f"sasa.{number}.{value.name}"
    return nodes


def add_ledger(
    blocks: Blocks, interface: Interface, given: dict[str, ir.Value], made: dict[str, ir.Value]
) -> dict[str, ir.Value]:
    """Add the ledger's layers to the cache, and give what they hold of earlier tokens, by the guard's names.

    A runtime may hand in buffers that are longer than that, and expects them back as long (onnxruntime-genai).
    """
    graph = blocks.model.graph
    add, found = Builder(graph, LEDGER), {}
    whole, new = (add("Shape", value, start=1, end=2) for value in (blocks.inputs["attention_mask"], blocks.text))
    seen = add("Sub", whole, new)  # (1,), tokens before the call
    zero, far, axis = add.constant([0]), add.constant([FAR]), add.constant([2])
    like = next(value for name, value in blocks.past.items() if name.endswith(".key"))
    after = output(graph, like.name.replace("past_key_values", "present"))
    for name in interface.added():
        past = ir.Value(name=f"past_key_values.{name}", type=like.type, shape=like.shape)
        graph.inputs.append(past)
        found[str(past.name)] = add("Slice", past, zero, seen, axis)
        found[str(past.name)].type = like.type
        rest = add("Slice", past, whole, far, axis)
        present = add("Concat", found[str(past.name)], made[f"present.{name}"], rest, axis=2)
        present.name, present.type, present.shape = f"present.{name}", after.type, after.shape
        graph.outputs.append(present)
    return found


def _fill(blocks: Blocks, nodes: Iterable[ir.Node], safety: int) -> None:
    """Put the decoder's own blocks, and its head, where the guard has placeholders."""
    for node in [node for node in nodes if node.domain == PLACEHOLDERS]:
        first = node.inputs[0]
        assert first is not None
        if node.op_type == "Lane":
            found = add_lane(blocks, safety, first, node.inputs[1])
        else:
            found = add_head(blocks, first)
        wide = Builder(blocks.model.graph, f"{LANE}/{node.op_type}")("Cast", found, to=ir.DataType.FLOAT)
        node.outputs[0].replace_all_uses_with(wide)
        blocks.model.graph.remove(node, safe=True)
