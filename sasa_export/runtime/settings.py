"""config.sasa: whether the gate can run on it, and whether it is what was written."""

import hashlib
import json
from typing import Any

from sasa_export.runtime.nodes import EVERY_TOKEN, FORMAT, HOW_TO_LOAD, LANE, PROMPT


def check_settings(sasa: Any) -> dict[str, Any]:
    """Return config.sasa, or raise ValueError where the gate could not run on it."""
    try:
        return _checked(sasa)
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"config.sasa is damaged ({type(error).__name__}: {error}). {HOW_TO_LOAD}") from None


def _checked(sasa: Any) -> dict[str, Any]:
    needed = (
        "format",
        "safety_layer",
        "semantic_layer",
        "epsilon",
        "threshold",
        "refusal_token_ids",
        "generation_prompt_ids",
        "turn_token_ids",
        "gate",
        "graph",
    )
    if not isinstance(sasa, dict) or any(name not in sasa for name in needed):
        raise ValueError(f"config.json has no complete `sasa` entry, so there is no gate. {HOW_TO_LOAD}")
    if sasa["format"] != FORMAT:
        raise ValueError(f"config.sasa has format {sasa['format']}, this file reads {FORMAT}. {HOW_TO_LOAD}")
    if not all(0 <= safety < semantic for safety, semantic in _pairs(sasa)):
        raise ValueError(f"config.sasa needs 0 <= safety_layer < semantic_layer. {HOW_TO_LOAD}")
    if not 0.0 < sasa["threshold"] < 1.0 or not sasa["refusal_token_ids"]:
        raise ValueError(f"config.sasa has no usable threshold or refusal. {HOW_TO_LOAD}")
    if sasa["gate"] not in (PROMPT, EVERY_TOKEN):
        raise ValueError(f"config.sasa's gate is {sasa['gate']!r}, which nothing here runs. {HOW_TO_LOAD}")
    if not _is_sasa(sasa["graph"], sasa):
        raise ValueError(f"config.sasa's graph is not that of its layers, from tap to gate. {HOW_TO_LOAD}")
    return sasa


def _is_sasa(graph: list[dict[str, Any]], sasa: dict[str, Any]) -> bool:
    """Is this graph the main lane, and behind it exactly the chain that the layers of `sasa` call for?"""
    main: dict[Any, Any] = {node.get("index"): node for node in graph if node["op"] == "block"}
    if sorted(main) != list(range(len(main))):
        return False
    positions, pairs = sasa.get("probe_positions", 1), _pairs(sasa)
    last = len(main) - 1 if sasa.get("probe_block") is None else sasa["probe_block"]
    if any(not (safety < semantic < len(main) and safety <= last < len(main)) for safety, semantic in pairs):
        return False
    if not isinstance(positions, int) or positions < 1:
        return False
    if sasa["gate"] == EVERY_TOKEN and (positions > 1 or len(pairs) > 1):
        return False
    chain = [node for node in graph if node["op"] in LANE]
    places = {node["name"]: place for place, node in enumerate(chain)}
    # The main lane's nodes that the chain reads are known by their modules, its own by their places.
    found = [
        (node["op"], _module_of(node), [places[name] for name in node["inputs"] if name in places]) for node in chain
    ]
    settings = {"positions": positions, "epsilon": sasa["epsilon"]}
    kept = all(node.get(name, 1) == value for node in chain for name, value in settings.items() if _has(node, name))
    return found == _wanted(main, pairs, last, logits=sasa.get("probe_space") == "logits") and kept


def _pairs(sasa: dict[str, Any]) -> list[tuple[int, int]]:
    """All pairs of safety and semantic layer; none where the probe reads the main lane."""
    first = sasa["safety_layer"], sasa["semantic_layer"]
    further = [tuple(pair) for pair in sasa.get("further_pairs", [])]
    if any(len(pair) != 2 for pair in further):
        raise TypeError("further_pairs holds what is no pair of layers")
    return further if first == (None, None) else [first, *further]


def _module_of(node: dict[str, Any]) -> Any:
    return node.get("module") if node["op"] in ("tap", "lane_block") else None


def _has(node: dict[str, Any], name: str) -> bool:
    return node["op"] == {"positions": "lane_norm", "epsilon": "projection"}[name]


def _wanted(main: dict[Any, Any], pairs: list[tuple[int, int]], last: int, *, logits: bool) -> list[tuple]:
    """What SASA adds to a graph: operation, block's module, and which of the steps before it each step reads."""
    steps: list[tuple] = []

    def add(operation: str, inputs: list[int], block: int | None = None) -> int:
        steps.append((operation, None if block is None else main[block]["module"], inputs))
        return len(steps) - 1

    if not pairs:
        ends = [add("tap", [], len(main) - 1)]
    else:
        taps = [[add("tap", [], block) for block in pair] for pair in pairs]
        ends = [add("projection", pair) for pair in taps]
        for number, (safety, _) in enumerate(pairs):
            for block in range(safety + 1, last + 1):
                ends[number] = add("lane_block", [ends[number]], block)
    ends = [add("lane_norm", [end]) for end in ends]
    if logits:
        ends = [add("lane_head", [end]) for end in ends]
    if len(ends) > 1:
        ends = [add("join", ends)]
    add("gate", [add("probe", ends)])
    return steps


def fingerprint(sasa: dict[str, Any]) -> str:
    """SHA-256 over all settings but itself, so that an edited entry is seen when it is loaded."""
    kept = {key: value for key, value in sasa.items() if key != "sha256"}
    text = json.dumps(kept, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
