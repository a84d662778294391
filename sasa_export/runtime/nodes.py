"""What the graph in config.sasa says of its lanes, and how config.sasa words its gate."""

from typing import Any

FORMAT = 2  # of config.sasa; a directory of another format is refused
LANE = ("tap", "projection", "lane_block", "lane_norm", "lane_head", "join", "probe", "gate")  # what SASA adds
PROMPT, EVERY_TOKEN = "prompt", "every-token"  # what config.sasa["gate"] has judged
HOW_TO_LOAD = "Load the directory as sasa-export wrote it, or export it again."


def lane_entries(graph: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The nodes that second lanes start from: projections; without any, the tap that the probe reads."""
    return [node for node in graph if node["op"] == "projection"] or [node for node in graph if node["op"] == "tap"]


def graph_ends(graph: list[dict[str, Any]]) -> list[str]:
    """The name of each second lane's last block, or of the main lane's tap where there is no second lane."""
    return [str(node["inputs"][0]) for node in graph if node["op"] == "lane_norm"]


def positions_read(graph: list[dict[str, Any]]) -> int:
    """Over how many of the last positions the probe reads a mean."""
    return int(max(node.get("positions", 1) for node in graph if node["op"] == "lane_norm"))


def lane_layers(sasa: dict[str, Any]) -> int:
    """How many cache layers the second lane has of its own, behind the ledger's."""
    return sum(node["op"] == "lane_block" for node in sasa["graph"]) if sasa["gate"] == EVERY_TOKEN else 0
