"""What a row of the matrix is, and the list of all rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

REFUSED = "refused"  # emitted and ended
TOKENS_OF_IT = "only tokens of the refusal"  # an option forbids the wanted ones
NOTHING = "nothing of the model's"  # an option forbids all tokens of the refusal: every other logit is the same
LOUD = "loud error"
UNCHANGED = "unchanged"  # the original's tokens in the same way of running

# What a row is run on: tiny models of these families, some as ONNX graphs, and the embedded model.
LLAVA = ("llava",)
THREE = ("llava", "gemma3", "qwen2_5_vl")  # plain positions; masks by layer type; three position axes
FAMILIES = (*THREE, "llava_next", "smolvlm", "idefics3")
GRAPHS = ("llava onnx", "gemma3 onnx", "qwen2_5_vl onnx", "smol-llava onnx")
FAST = {*THREE, "llava onnx"}


@dataclass(frozen=True)
class Row:
    """One way of running. `check` is given the bench of one of `on`, and raises where the row does not hold."""

    section: str
    name: str
    check: Callable[[Any], None]
    harmful: str
    harmless: str
    on: tuple[str, ...]
    slow: bool
    remark: str

    def identifier_on(self, target: str) -> str:
        """What the test of this row on a target is named."""
        return "".join(letter if letter.isalnum() else "_" for letter in f"{self.name.lower()}-{target}")

    def is_slow(self, target: str) -> bool:
        return self.slow or target not in FAST


ROWS: list[Row] = []


def enter(
    section: str,
    checks: Mapping[str, Callable[[Any], None]],
    *,
    on: tuple[str, ...] = LLAVA,
    harmful: str = REFUSED,
    slow: bool = False,
    remark: str = "",
) -> None:
    """Add rows of one section by their names."""
    harmless = LOUD if harmful == LOUD else UNCHANGED
    for name, check in checks.items():
        assert name not in {row.name for row in ROWS}, f"two rows are named {name}"
        ROWS.append(Row(section, name, check, harmful, harmless, on, slow, remark))
