"""The decoder as plain data: nodes, and the edges between them that carry the hidden state.

A `LayerGraph` is what one stage hands to the next: the trace observes it, the rewrite passes extend it, the
patched model's config.json stores it, and the runtime executes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

MAIN_LANE = ("vision", "projector", "embed", "between", "block", "norm", "head", "after_head")


@dataclass(frozen=True)
class Node:
    """One step: `op` says what is done, `module` whose weights do it, `inputs` whose values it reads."""

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
    """An ordered, immutable graph; a node comes after everything that it reads."""

    nodes: tuple[Node, ...]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __getitem__(self, name: str) -> Node:
        return {node.name: node for node in self.nodes}[name]

    def of(self, op: str) -> tuple[Node, ...]:
        """All nodes of one operation, in order."""
        return tuple(node for node in self.nodes if node.op == op)

    def earliest_safety_layer(self) -> int:
        """The first block from which on nothing is added between blocks: replaying blocks in front would lose that."""
        added = [self[node.inputs[0]].attributes["index"] for node in self.of("between")]
        return max(added, default=-1) + 1

    def add(
        self, name: str, op: str, module: str | None = None, inputs: tuple[str, ...] | None = None, **attributes: Any
    ) -> LayerGraph:
        """The graph with one more node, which reads the last one unless `inputs` says otherwise."""
        before = (self.nodes[-1].name,) if inputs is None else inputs
        return LayerGraph((*self.nodes, Node(name, op, before, module, attributes)))

    def to_json(self) -> list[dict[str, Any]]:
        return [node.to_json() for node in self.nodes]


def lane_tokens(nodes: Sequence[dict[str, Any]]) -> int | None:
    """Over how many tokens the second lane of such a graph runs; None where there is none."""
    return next((node["tokens"] for node in nodes if node["op"] == "projection"), None)


def blocks_again(nodes: Sequence[dict[str, Any]]) -> list[int]:
    """The numbers of the blocks that run once more, lane by lane, in a graph as `LayerGraph.to_json` gives it."""
    return [node["index"] for node in nodes if node["op"] == "lane_block"]
