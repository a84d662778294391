"""A LayerGraph as a Mermaid diagram. Consecutive blocks are one box."""

from collections import Counter

from sasa_export.graph import MAIN_LANE, LayerGraph, Node

LABELS = {
    "vision": "vision tower",
    "projector": "projector",
    "embed": "token embeddings, picture merged in",
    "between": "added between blocks: {name}",
    "norm": "final norm",
    "head": "head",
    "after_head": "what follows the head",
    "tap": "{of} layer {index}",
    "projection": "projection",
    "lane_norm": "final norm, judged position",
    "lane_head": "head",
    "state_norm": "final norm, judged position",
    "join": "side by side",
    "probe": "probe",
    "gate": "gate",
}


def mermaid(graph: LayerGraph) -> str:
    """Return the graph as Mermaid text. Consecutive blocks are one box, which ends where another node reads."""
    readers = Counter(name for node in graph for name in node.inputs)
    runs: list[list[Node]] = []
    for node in graph:
        last = runs[-1][-1] if runs else node
        alike = node.op == last.op and node.op in ("block", "lane_block")
        if alike and node.inputs == (last.name,) and readers[last.name] == 1:
            runs[-1].append(node)
        else:
            runs.append([node])
    boxes = {node.name: f"n{number}" for number, run in enumerate(runs) for node in run}
    lines = ["flowchart TD", *(f'    {boxes[run[0].name]}["{_label(run)}"]' for run in runs)]
    for run in runs:
        lines += [f"    {boxes[name]} --> {boxes[run[0].name]}" for name in run[0].inputs]
    lane = [boxes[run[0].name] for run in runs if run[0].op not in MAIN_LANE]
    if lane:
        lines += ["    classDef sasa fill:#e8f0fe,stroke:#1a56c4", f"    class {','.join(lane)} sasa"]
    return "\n".join(lines) + "\n"


def _label(run: list[Node]) -> str:
    first, last = run[0], run[-1]
    if first.op in ("block", "lane_block"):
        numbers = [node.attributes["index"] for node in (first, last)]
        span = f"block {numbers[0]}" if first is last else f"blocks {numbers[0]} to {numbers[1]}"
        return span if first.op == "block" else f"second lane: {span}"
    if first.attributes.get("of") == "last":
        return f"last block, {first.attributes['index']}"
    tokens = f", last {first.attributes['tokens']} tokens" if "tokens" in first.attributes else ""
    return LABELS[first.op].format(name=first.name, **first.attributes) + tokens
