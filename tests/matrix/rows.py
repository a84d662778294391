"""What a row of the matrix is, and the list of all rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from matrix.bench import Bench, Inputs, Way, generating, mixed

REFUSED = "refused"  # emitted and ended
TOKENS_OF_IT = "only tokens of the refusal"  # in another order, or not all of them
NOTHING = "nothing of the model's"  # an option forbids all tokens of the refusal: every other logit is the same
LOUD = "loud error"
UNCHANGED = "unchanged"  # the original's tokens in the same way of running

# What a row is run on: tiny models of these families, some as ONNX graphs, and the embedded model.
LLAVA = ("llava",)
OTHERS = ("gemma3", "qwen2_5_vl")  # masks by layer type; three position axes
THREE = (*LLAVA, *OTHERS)
REST = ("llava_next", "smolvlm", "idefics3")
SMOL = ("smol-llava",)
BOTH = ("llava", "llava onnx")
GRAPHS = ("gemma3 onnx", "qwen2_5_vl onnx", "smol-llava onnx")

Check = Callable[[Bench], None]


@dataclass(frozen=True)
class Row:
    """One way of running. `check` is given the bench of a target, and raises where the row does not hold."""

    section: str
    name: str
    check: Check
    harmful: str = REFUSED
    on: tuple[str, ...] = LLAVA
    slow: bool = False  # on LLaVA too; on all else every row is
    remark: str = ""

    @property
    def harmless(self) -> str:
        return LOUD if self.harmful == LOUD else UNCHANGED

    def identifier_on(self, target: str) -> str:
        """What the test of this row on a target is named."""
        return "".join(letter if letter.isalnum() else "_" for letter in f"{self.name.lower()}-{target}")


ROWS: list[Row] = []


def enter(
    section: str,
    ways: Mapping[str, Way | dict[str, Any]],
    *,
    prompts: Callable[[Bench], list[Inputs]] = mixed,
    error: str = "",
    harmful: str = REFUSED,
    **further: Any,
) -> None:
    """Add rows by their names: a way of running each, or the options of `generate` that make it one.

    Args: error: what every way must raise an error about, in place of an answer; further: fields of Row.
    """
    for name, way in ways.items():
        run = generating(**way) if isinstance(way, dict) else way

        def check(bench: Bench, run: Way = run) -> None:
            if error:
                bench.check_error(lambda model: run(bench, model, prompts(bench)[0]), error)
            else:
                bench.check(run, prompts(bench), exactly=harmful == REFUSED)

        enter_checks(section, {name: check}, harmful=LOUD if error else harmful, **further)


def enter_checks(section: str, checks: Mapping[str, Check], **further: Any) -> None:
    """Add rows by their names that compare in their own way."""
    for name, check in checks.items():
        assert name not in {row.name for row in ROWS}, f"two rows are named {name}"
        ROWS.append(Row(section, name, check, **further))
