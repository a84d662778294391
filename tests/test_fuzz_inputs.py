"""Inputs of any kind to a guarded model: an error, or a row that is refused or was judged on what it shows.

`SASA_FUZZ=1000` tries so many of each kind (`make fuzz`); a few by default.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from conftest import Guard
from fuzzing import Tries, examples
from hypothesis import given
from hypothesis import strategies as st
from onnx_runner import Runner
from test_feeding import positions
from torch import Tensor

quick = examples(40)
ROWS, ANSWER = 3, 4
FAMILIES = [pytest.param(family, marks=pytest.mark.xdist_group(family)) for family in ("llava", "gemma3")]
ODD = (float("nan"), float("inf"), float("-inf"), 1e38, -1e30, 1e-40, 0.0)


@dataclass(frozen=True)
class Plan:
    """How a prompt is fed, in shares of its length."""

    cuts: list[float]
    hidden: list[tuple[int, float]]  # (row, place): masked from the start
    later: list[tuple[int, int, float]]  # (call, row, place): shown or hidden in one call, when it lies in the past
    odd: list[tuple[int, float, float]]  # (row, place, value): embeddings that are no embedding

    def ends(self, tokens: int) -> list[int]:
        return sorted({max(1, int(cut * tokens)) for cut in self.cuts} | {tokens})


share = st.floats(0, 0.999)
plans = st.builds(
    Plan,
    cuts=st.lists(share, max_size=6),
    hidden=st.lists(st.tuples(st.integers(0, ROWS - 1), share), max_size=4),
    later=st.lists(st.tuples(st.integers(1, 5), st.integers(0, ROWS - 1), share), max_size=2),
    odd=st.just([]),
)
broken = st.builds(
    Plan,
    cuts=st.lists(share, max_size=6),
    hidden=st.just([]),
    later=st.just([]),
    odd=st.lists(
        st.tuples(st.integers(0, ROWS - 1), share | st.sampled_from((0.93, 0.96, 0.999)), st.sampled_from(ODD)),
        min_size=1,
        max_size=3,
    ),
)


def prompt(guarded: Guard, plan: Plan, seed: int = 5) -> tuple[dict[str, Any], Tensor]:
    """A batch without pictures, with the plan's tokens masked, and the embeddings of it and an answer.

    These are (rows, tokens + ANSWER - 1, hidden).
    """
    inputs = dict(tiny.prompts(guarded.processor, images=False, count=ROWS, seed=seed, padding_side="left"))
    mask = inputs["attention_mask"].clone()  # (rows, tokens)
    free = mask.shape[1] - len(guarded.model.config.sasa["generation_prompt_ids"])
    for row, place in plan.hidden:
        mask[row, int(place * free)] = 0
    inputs["attention_mask"] = mask
    answer = torch.full((ROWS, ANSWER - 1), 70)
    embeds = guarded.stock.get_input_embeddings()(torch.cat([inputs["input_ids"], answer], dim=1)).clone()
    for row, place, value in plan.odd:
        embeds[row, int(place * embeds.shape[1])] = value
    return inputs, embeds


def masks(plan: Plan, mask: Tensor, ends: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """The mask of each call, (rows, end), and which rows' past it shows otherwise than it was, (rows,)."""
    calls, changed = [], []
    for call, end in enumerate(ends):
        past = ends[call - 1] if call else 0
        given = mask[:, :end].clone()
        for when, row, place in plan.later:
            if when == call:
                given[row, int(place * past)] = 1 - given[row, int(place * past)]
        calls.append(given)
        changed.append((given[:, :past] != mask[:, :past]).any(-1))
    return calls, changed


def forced(logits: Tensor, refusal: list[int]) -> Tensor:
    """Which rows' logits (rows, vocabulary) say nothing but a word of the refusal."""
    allowed = torch.zeros(logits.shape[-1], dtype=torch.bool)
    allowed[refusal] = True
    return allowed[logits.argmax(-1)] & (logits == logits.amax(-1, keepdim=True)).sum(-1).eq(1) & (logits.amax(-1) == 0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_masks(guard: Callable[..., Guard], family: str) -> None:
    """P(unsafe) is the oracle's on the shown tokens; a mask that later shows or hides others is an error."""
    guarded, count = guard(family), Tries(f"attention masks by hand, in pieces, torch ({family})")

    @quick
    @given(plans)
    @torch.no_grad()
    def run(plan: Plan) -> None:
        count()
        inputs, _ = prompt(guarded, plan)
        ends = plan.ends(inputs["input_ids"].shape[1])
        calls, changed = masks(plan, inputs["attention_mask"], ends)
        places, cache, output = positions(guarded, inputs), None, None
        with guarded.at(2.0):  # nothing is refused on the way
            for start, end, mask, wrong in zip([0, *ends[:-1]], ends, calls, changed, strict=True):
                call: dict[str, Any] = {"input_ids": inputs["input_ids"][:, start:end], "attention_mask": mask}
                if "token_type_ids" in inputs:
                    call["token_type_ids"] = inputs["token_type_ids"][:, :end]
                call |= {"position_ids": places[..., start:end], "past_key_values": cache, "use_cache": True}
                if wrong.any():
                    with pytest.raises(ValueError, match="shows or hides"):
                        guarded.model(**call)
                    return
                output = guarded.model(**call)
                cache = output.past_key_values
        assert output is not None
        expected = guarded.expected({**inputs, "position_ids": places})  # (rows,)
        torch.testing.assert_close(output.unsafe_probability, expected, rtol=0.0, atol=1e-5)

    run()
    count.passed()


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_that_are_none(guard: Callable[..., Guard], family: str) -> None:
    """A row is answered only where its last verdict was below the threshold and its logits are numbers."""
    guarded, count = guard(family), Tries(f"embeddings with NaN, infinite and huge values, torch ({family})")

    @quick
    @given(broken)
    @torch.no_grad()
    def run(plan: Plan) -> None:
        count()
        inputs, embeds = prompt(guarded, plan)
        ends = with_answer(plan, inputs)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ANSWER - 1), value=1)  # (rows, tokens)
        allowed, cache = torch.zeros(ROWS, dtype=torch.bool), None
        with guarded.halved(inputs):
            threshold = guarded.model.config.sasa["threshold"]
            for start, end in zip([0, *ends[:-1]], ends, strict=True):
                further = {} if family != "gemma3" else {"token_type_ids": torch.zeros_like(mask[:, :end])}
                output = guarded.model(
                    inputs_embeds=embeds[:, start:end], attention_mask=mask[:, :end], past_key_values=cache,
                    use_cache=True, **further,
                )  # fmt: skip
                cache, found = output.past_key_values, output.unsafe_probability  # (rows,)
                if found is not None:
                    allowed = torch.where(found.isnan(), allowed, found < threshold)
                if end >= inputs["input_ids"].shape[1]:
                    answered(output.logits[:, -1], allowed, guarded.refusal)

    run()
    count.passed()


def with_answer(plan: Plan, inputs: dict[str, Any]) -> list[int]:
    """Where the prompt's pieces end, and then each token of the answer."""
    ends = plan.ends(inputs["input_ids"].shape[1])
    return [*ends, *(ends[-1] + more for more in range(1, ANSWER))]


def answered(logits: Tensor, allowed: Tensor, refusal: list[int]) -> None:
    """Fail where a row (rows, vocabulary) is answered though no verdict allows it, or with what is no number."""
    open_rows = ~forced(logits, refusal)  # (rows,)
    assert not (open_rows & ~allowed).any(), "a row was answered that no verdict allows"
    assert torch.isfinite(logits[open_rows]).all(), "a row was answered out of what is no number"


MASK_FORMS: dict[str, Callable[[Tensor], Any]] = {
    "four dimensions, additive": lambda mask: torch.zeros(len(mask), 1, mask.shape[1], mask.shape[1]) - 1e4,
    "four dimensions, all shown": lambda mask: torch.ones(len(mask), 1, mask.shape[1], mask.shape[1]).bool(),
    "by the type of layer": lambda mask: {"full_attention": torch.ones(len(mask), 1, *mask.shape[1:] * 2).bool()},
    "three dimensions": lambda mask: mask[:, None],
    "too short": lambda mask: mask[:, :-3],
    "too long": lambda mask: torch.cat([mask, mask[:, :2]], dim=1),
    "another batch": lambda mask: mask[:2],
    "a list": lambda mask: mask.tolist(),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", MASK_FORMS)
@torch.no_grad()
def test_masks_of_other_forms(guard: Callable[..., Guard], family: str, form: str) -> None:
    guarded = guard(family)
    inputs, _ = prompt(guarded, Plan([], [], [], []))
    inputs["attention_mask"] = MASK_FORMS[form](inputs["attention_mask"])
    with pytest.raises((NotImplementedError, ValueError, RuntimeError, IndexError)):
        guarded.model(**inputs)


@torch.no_grad()
def test_a_row_that_shows_nothing(guard: Callable[..., Guard]) -> None:
    """A row of padding alone has no prompt to judge, and attention over no key is attention over all."""
    guarded = guard("llava")
    inputs, _ = prompt(guarded, Plan([], [], [], []))
    inputs["attention_mask"][1] = 0
    with guarded.at(0.999):
        logits = guarded.model(**inputs).logits[:, -1]  # (rows, vocabulary)
    assert forced(logits, guarded.refusal).tolist() == [False, True, False]


PICTURES: dict[str, Callable[[dict[str, Any], int], dict[str, Any]]] = {
    "NaN pixels": lambda inputs, _: {"pixel_values": inputs["pixel_values"] * float("nan")},
    "infinite pixels": lambda inputs, _: {"pixel_values": inputs["pixel_values"] + float("inf")},
    "huge pixels": lambda inputs, _: {"pixel_values": inputs["pixel_values"] * 1e30},
    "no pixels for the picture's tokens": lambda inputs, _: {"pixel_values": None},
    "pixels of another size": lambda inputs, _: {"pixel_values": inputs["pixel_values"][..., :-8, :-8]},
    "one picture too few": lambda inputs, _: {"pixel_values": inputs["pixel_values"][:-1]},
    "one picture too many": lambda inputs, _: {"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)},
    "one of the picture's tokens missing": lambda inputs, token: {
        "input_ids": inputs["input_ids"].masked_fill((inputs["input_ids"] == token).cumsum(-1) == 1, 5)
    },
    "no tokens": lambda inputs, _: {name: inputs[name][:, :0] for name in ("input_ids", "attention_mask")},
    "a token outside the vocabulary": lambda inputs, _: {"input_ids": inputs["input_ids"].masked_fill(
        torch.arange(inputs["input_ids"].shape[1]) == 3, 10**6)},
}  # fmt: skip


@pytest.mark.parametrize("what", PICTURES)
@torch.no_grad()
def test_pictures_and_tokens(guard: Callable[..., Guard], what: str) -> None:
    guarded = guard("llava")
    inputs = dict(tiny.prompts(guarded.processor, images=True, count=ROWS, seed=3, padding_side="left"))
    with guarded.at(0.999):
        try:
            output = guarded.model(**inputs | PICTURES[what](inputs, guarded.stock.config.image_token_index))
        except (ValueError, RuntimeError, IndexError, TypeError):
            return
    found = output.unsafe_probability  # (rows,)
    answered(output.logits[:, -1], found < 0.999, guarded.refusal)


# -------------------------------------------------------------------------------------------------- onnxruntime


@pytest.mark.xdist_group("onnx-llava")
@pytest.mark.parametrize("kind", [plans, broken], ids=["masks", "embeddings"])
def test_onnx(split: Any, exported: Any, kind: Any) -> None:
    """A graph cannot raise, so it refuses where torch raises; all else is judged as there."""
    guarded = split("llava")
    runner, threshold = Runner(exported(guarded.directory)), guarded.model.config.sasa["threshold"]
    odd = kind is broken
    count = Tries("embeddings with NaN, infinite and huge values, onnxruntime" if odd else "masks, onnxruntime")

    @quick
    @given(kind)
    @torch.no_grad()
    def run(plan: Plan) -> None:
        count()
        inputs, embeds = prompt(guarded, plan)
        tokens, ends = inputs["input_ids"].shape[1], with_answer(plan, inputs)
        grown = torch.nn.functional.pad(inputs["attention_mask"], (0, ANSWER - 1), value=1)  # (rows, tokens)
        calls, changed = masks(plan, grown, ends)
        places = (grown.cumsum(-1) - 1).clamp_min(0)  # (rows, tokens)
        allowed, closed = torch.zeros(ROWS, dtype=torch.bool), torch.zeros(ROWS, dtype=torch.bool)
        runner.start(ROWS)
        for start, end, mask, wrong in zip([0, *ends[:-1]], ends, calls, changed, strict=True):
            runner.call(embeds[:, start:end].numpy(), mask.numpy(), places[..., start:end].numpy())
            assert runner.probability is not None
            found = torch.from_numpy(runner.probability)  # (rows,)
            allowed = torch.where(found.isnan(), allowed, found < threshold)
            logits = torch.from_numpy(runner.logits)
            if wrong.any():
                assert forced(logits, guarded.refusal)[wrong].all(), "a mask that shows other tokens was answered"
            closed |= wrong
            if end >= tokens:
                answered(logits, allowed, guarded.refusal)
            if end == tokens and not odd and not closed.any():
                expected = guarded.expected({**inputs, "position_ids": places[:, :tokens]})  # (rows,)
                torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-4)

    run()
    count.passed()
