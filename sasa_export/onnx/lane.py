"""Adds the second lane to a graph: a clone of its blocks that runs on other states and shares every weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from sasa_export.errors import TraceError
from sasa_export.onnx.blocks import OTHER, SHAPE, WITH_SUM, Blocks, has_branches, named
from sasa_export.onnx.branch import needed, reads

LANE = "/sasa/lane"


class Builder:
    """Appends nodes to a graph under names with one prefix. Each call returns the new node's first output."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph, self.prefix, self.count = graph, prefix, 0

    def __call__(
        self, operation: str, *inputs: ir.Value | None, like: ir.Node | None = None, **attributes: Any
    ) -> ir.Value:
        """Append a node, with the domain and attributes of the node `like`, if given."""
        self.count += 1
        given = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]
        given += [] if like is None else like.attributes.values()
        name = f"{self.prefix}/{operation}_{self.count}"
        node = ir.Node("" if like is None else like.domain, operation, inputs, given, name=name)
        node.outputs[0].name = name[1:]
        self.graph.append(node)
        return node.outputs[0]

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        return self("Constant", value=ir.tensor(np.array(value, dtype)))


def add_lane(
    blocks: Blocks, safety: int, states: ir.Value, given: Mapping[str, ir.Value] | None = None, *, prefix: str = LANE
) -> ir.Value:
    """Append the second lane: the blocks after block `safety` run on `states` (batch, context, hidden). Return the
    final norm's output, (batch, context, hidden).

    The lane computes a first call with only these tokens, and an empty cache. `given` holds the decoder's inputs in
    that call, such as attention_mask and position_ids. Raises TraceError where the clone would read the call's text.
    """
    add = Builder(blocks.model.graph, prefix)
    begun = blocks.states[safety]
    states = add("CastLike", states, begun)
    replaced = {begun: states, **_of_a_first_call(blocks, states, given or {}, add)}
    node = begun.producer()
    assert node is not None
    if node.op_type in WITH_SUM:
        # The same kernel adds zero, so that equal states give equal bits. The state already contains the bias.
        zero = add("CastLike", add("ConstantOfShape", add("Shape", states)), begun)
        kept = node.inputs[2 : 3 if node.op_type == WITH_SUM[0] else 4]
        replaced[node.outputs[0]] = add(node.op_type, states, zero, *kept, like=node)
    _check_text(blocks, safety, replaced)
    return clone(blocks.model.graph, blocks.norm, replaced, prefix)


def add_head(blocks: Blocks, state: ir.Value, prefix: str = LANE) -> ir.Value:
    """Append the head, and return the logits (batch, vocabulary) of normed states (batch, hidden)."""
    add = Builder(blocks.model.graph, f"{prefix}/head")
    alone = add("Unsqueeze", add("CastLike", state, blocks.read), add.constant([1]))  # (batch, 1, hidden)
    logits = clone(blocks.model.graph, blocks.logits, {blocks.read: alone}, f"{prefix}/head")
    return add("Gather", logits, add.constant(-1), axis=1)


def _of_a_first_call(
    blocks: Blocks, states: ir.Value, given: Mapping[str, ir.Value], add: Builder
) -> dict[ir.Value, ir.Value]:
    """Return replacements of the decoder's inputs for a first call: an empty cache, `given`, and a text of zeros."""
    rows, replaced, empty = add("Shape", states, start=0, end=1), {}, dict[Any, ir.Value]()
    for value in blocks.past.values():
        sizes = blocks.sizes(value)[1:]
        key = (tuple(sizes), value.dtype)
        if key not in empty:
            shape = add("Concat", rows, add.constant(sizes), axis=0)
            empty[key] = add("ConstantOfShape", shape, value=ir.tensor([0], dtype=value.dtype))
        replaced[value] = empty[key]
    for name, value in given.items():
        if name in blocks.inputs:
            replaced[blocks.inputs[name]] = add("CastLike", value, blocks.inputs[name])
    text = blocks.text  # the clone reads only its shape
    like = add("Shape", states, start=0, end=2)
    if text.name != "input_ids":
        like = add("Concat", like, add("Shape", text, start=2), axis=0)
    replaced[text] = add("ConstantOfShape", like, value=ir.tensor([0], dtype=text.dtype))
    return replaced


def _check_text(blocks: Blocks, safety: int, replaced: dict[ir.Value, ir.Value]) -> None:
    """Raise TraceError where blocks after the safety layer read more of the text than its shape."""
    lane = needed([blocks.norm], stop=replaced)
    text, states = {blocks.text}, {blocks.states[safety]}
    for node in blocks.model.graph:
        if node in lane and node.op_type not in SHAPE:
            given = set(reads(node))
            if given & text and given & states:
                raise TraceError(
                    f"{named(node)}: behind block {safety} the decoder reads its text once more, which the second lane "
                    f"lacks. Choose a later --safety-layer. {OTHER}"
                )
            text.update(node.outputs if given & text else ())
            states.update(node.outputs if given & states else ())


def clone(graph: ir.Graph, target: ir.Value, replaced: dict[ir.Value, ir.Value], prefix: str) -> ir.Value:
    """Append a clone of the nodes behind `target` with values `replaced`; return its output. Other nodes are shared."""
    made, wanted = dict(replaced), needed([target], stop=replaced)
    for node in list(graph):
        if node not in wanted or not any(value in made for value in reads(node)):
            continue
        if has_branches(node):
            raise TraceError(f"{named(node)} has branches, and the second lane would have to hold them twice. {OTHER}")
        copy = ir.Node(
            node.domain, node.op_type, [made.get(value, value) if value is not None else None for value in node.inputs],
            list(node.attributes.values()),
            name=prefix + str(node.name), num_outputs=len(node.outputs), overload=node.overload, version=node.version,
        )  # fmt: skip
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.type = f"{prefix[1:]}/{old.name}" if old.name else "", old.type
            made[old] = new
        graph.append(copy)
    return made[target]
