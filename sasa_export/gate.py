"""The settings of a patched model's gate, as config.json holds them under `sasa`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from sasa_export.graph.rewrite import LaneSettings
from sasa_export.runtime.settings import FORMATS, OPERATOR, check_settings


def documented(help: str, **default: Any) -> Any:
    """Return a dataclass field. docs/reference/gate.md prints its help."""
    return field(metadata={"help": help}, **default)


@dataclass(frozen=True)
class GateSpec:
    """The settings of a patched model's gate, which the runtime executes. Layer numbers are zero-based."""

    safety_layer: int | None = documented("The safety layer. null: there is no projection, and no second lane.")
    semantic_layer: int | None = documented("The semantic layer, or null.")
    layers_from: str = documented(
        "Where the two layers come from: the paper, a measurement, a search, the user, or a guess."
    )
    epsilon: float = documented("The smallest squared length by which the projection divides.")
    threshold: float = documented("A prompt is refused where P(unsafe) is this much or more.")
    refusal: str = documented(
        "The text of the refusal. Where it is edited, it is tokenized anew when the model is loaded."
    )
    refusal_token_ids: Sequence[int] = documented("The refusal as tokens, the end of sequence last.")
    generation_prompt_ids: Sequence[int] = documented(
        "The tokens with which the chat template opens an answer. Behind them a verdict is due."
    )
    turn_token_ids: Sequence[int] = documented("The tokens that end an answer, or open another turn.")
    graph: Sequence[Mapping[str, Any]] = documented(
        "The steps of the model and of its gate: `name`, `op`, `inputs`, `module`."
    )
    format: int = documented(
        "The version of these settings. The runtime refuses one that it does not know.", default=FORMATS[-1]
    )
    gate: str = documented("`enforce`, or `observe`: judge and report, and refuse nothing.", default="enforce")
    prove: bool | None = documented(
        "Whether the model proves its gate when it is loaded. null: only on a transformers that was not tried.",
        default=None,
    )
    begun_answers: str = documented(
        "What becomes of text that `generate` gets behind the last generation prompt: `error`, or `allow`, unjudged.",
        default="error",
    )
    known: Sequence[Mapping[str, Any]] = documented(
        "Prompts as token ids, with their P(unsafe). When it is loaded, the model sees by them whether its weights are "
        "the exported ones.",
        default=(),
    )
    tokenized_refusal: str | None = documented("The text that `refusal_token_ids` stand for.", default=None)
    other_generation_prompt_ids: Sequence[Sequence[int]] = documented(
        "What the chat template writes in place of `generation_prompt_ids` where thinking is turned on or off.",
        default=(),
    )
    graphs: Mapping[str, str] | None = documented("Of ONNX graphs: the file of each, by role.", default=None)
    lengths: Mapping[str, int] | None = documented(
        "Of ONNX graphs: the length of each axis of the cache that has a name and a fixed length.", default=None
    )
    dtype: str | None = documented("Of ONNX graphs: the type of their numbers.", default=None)
    opset: int | None = documented("Of ONNX graphs that sasa-export made: their operator set.", default=None)

    @classmethod
    def from_json(cls, entry: Any) -> GateSpec:
        """Read the `sasa` entry of config.json. Raise ValueError where the gate could not run with it."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in check_settings(entry).items() if name in known})

    def to_json(self) -> dict[str, Any]:
        """Return the `sasa` entry of config.json. Optional fields that are None are left out."""
        optional = ("tokenized_refusal", "graphs", "lengths", "dtype", "opset")
        entries = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in entries.items() if value is not None or name not in optional}

    @property
    def blocks(self) -> int:
        """The number of blocks of the decoder."""
        return sum(node["op"] == "block" for node in self.graph)

    @property
    def blocks_again(self) -> list[int]:
        """The indices of the blocks that the second lane runs."""
        return [node["index"] for node in self.graph if node["op"] == "lane_block"]

    @property
    def lane_tokens(self) -> int | None:
        """The number of tokens that the second lane runs over. None without a second lane."""
        return next((node["tokens"] for node in self.graph if node["op"] == "projection"), None)

    @property
    def lane(self) -> LaneSettings:
        """The settings of the second lane, without the soft cap of the model's head."""
        return LaneSettings(
            self.safety_layer, self.semantic_layer, self.epsilon, tokens=self.lane_tokens or LaneSettings.tokens
        )

    @property
    def observes(self) -> bool:
        """Whether the gate only judges, and refuses nothing."""
        return self.gate == "observe"

    @property
    def operator(self) -> dict[str, Any]:
        """The settings that an operator may change in config.json."""
        return {name: getattr(self, name) for name in OPERATOR}
