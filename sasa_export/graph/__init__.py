"""The decoder as plain data: nodes, and edges that carry the hidden state.

Each stage hands a `LayerGraph` to the next: the trace creates it, the rewrite extends it, the patched model's
config.json stores it, and the runtime executes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MAIN_LANE = ("vision", "projector", "embed", "between", "block", "norm", "head", "after_head")


@dataclass(frozen=True)
class Node:
    """One step: `op` names the operation, `module` the module with its weights, `inputs` the nodes it reads."""

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    module: str | None = None
    attributes: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        module = {} if self.module is None else {"module": self.module}
        return {"name": self.name, "op": self.op, "inputs": list(self.inputs), **module, **self.attributes}


@dataclass(frozen=True)
class LayerGraph:
    """An ordered, immutable graph. Every node comes after the nodes that it reads."""

    nodes: tuple[Node, ...]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __getitem__(self, name: str) -> Node:
        return {node.name: node for node in self.nodes}[name]

    def of(self, op: str) -> tuple[Node, ...]:
        """Return all nodes of one operation, in order."""
        return tuple(node for node in self.nodes if node.op == op)

    def earliest_safety_layer(self) -> int:
        """Return the earliest possible safety layer. An earlier lane would miss what is added between blocks."""
        added = [self[node.inputs[0]].attributes["index"] for node in self.of("between")]
        return max(added, default=-1) + 1

    def add(
        self, name: str, op: str, module: str | None = None, inputs: tuple[str, ...] | None = None, **attributes: Any
    ) -> LayerGraph:
        """Return the graph with one more node, which reads `inputs`, or by default the last node."""
        before = (self.nodes[-1].name,) if inputs is None else inputs
        return LayerGraph((*self.nodes, Node(name, op, before, module, attributes)))

    def to_json(self) -> list[dict[str, Any]]:
        return [node.to_json() for node in self.nodes]
