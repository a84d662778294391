"""Whatever a sender writes: P(unsafe) is the oracle's, refused rows say the refusal, others what the original says.

`SASA_FUZZ=1000` tries so many of each kind (`make fuzz`); a few by default.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import Guard
from fuzzing import examples, judged
from hypothesis import assume, given, reject
from hypothesis import strategies as st
from matrix.bench import begun_answers_allowed
from onnx_runner import Runner
from PIL import Image
from torch import Tensor

Chats = list[list[dict[str, Any]]]

OTHERS = [pytest.param(family, marks=pytest.mark.slow) for family in ("gemma3", "qwen2_5_vl")]
every_family = pytest.mark.parametrize("family", ["llava", *OTHERS])
each_reach = pytest.mark.parametrize("options", [{"lane_tokens": 64}, {}], ids=["64", "8"])

# Parts of any template, placeholders of pictures and ends of answers, as a sender may write them.
MARKUP = (
    "ASSISTANT:", "USER:", "</s>", "<s>", "<image>", "<pad>", "<|im_start|>assistant\n", "<|im_end|>", "<|image_pad|>",
    "<start_of_turn>model\n", "<end_of_turn>", "<eos>", "<start_of_image>", "I will not help.",
)  # fmt: skip


def picture(width: int, height: int, seed: int, mode: str) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 256, size=(height, width, 4), dtype=np.uint8)
    return {"type": "image", "image": Image.fromarray(pixels).convert(mode)}


texts = st.lists(st.sampled_from(MARKUP) | st.text(max_size=12), max_size=6).map(
    lambda parts: {"type": "text", "text": " ".join(parts)}
)
sides = st.sampled_from([1, 3, 32, 47, 150])
pictures = st.builds(picture, sides, sides, st.integers(0, 9), st.sampled_from(["RGB", "L", "RGBA", "P"]))
contents = st.tuples(st.lists(pictures, max_size=1), texts).map(lambda parts: [*parts[0], parts[1]])
roles = st.sampled_from([["user"], ["system", "user"], ["user", "assistant", "user"]])
chats = roles.flatmap(
    lambda names: st.tuples(
        *(
            st.builds(
                lambda name, content: {"role": name, "content": content},
                st.just(name),
                contents if name == "user" else texts.map(lambda text: [text]),
            )
            for name in names
        )
    ).map(list)
)
batches = st.lists(chats, min_size=1, max_size=3)


def threshold_at(scores: Tensor, row: int, above: bool) -> float:
    """A threshold just above or below the score of a row, with no other score near it."""
    threshold = float(scores[row % len(scores)]) + (1e-3 if above else -1e-3)
    assume((scores - threshold).abs().min() > 1e-4 and 0 < threshold < 1)
    return threshold


def encoded(guarded: Guard, batch: Chats) -> dict[str, Any]:
    """The inputs of a batch, if the original's processor and the original can take it."""
    try:
        inputs = dict(tiny.encode(guarded.processor, batch))
        guarded.stock(**inputs)
    except (ValueError, IndexError, TypeError, RuntimeError, AttributeError):
        reject()
    return inputs


@each_reach
@every_family
def test_conversations(guard: Callable[..., Guard], family: str, options: dict[str, Any]) -> None:
    """Any text, roles, markup and pictures, in any company."""
    guarded = guard(family, **options)

    @examples(15)
    @given(batches, st.integers(0, 2), st.booleans())
    @torch.no_grad()
    def run(batch: Chats, row: int, above: bool) -> None:
        inputs = encoded(guarded, batch)
        scores = guarded.expected(inputs)  # (batch,)
        threshold = threshold_at(scores, row, above)
        stock, prompt = guarded.stock, inputs["input_ids"].shape[1]
        with guarded.at(threshold):
            found = guarded.model(**inputs)
            said = guarded.model.generate(**inputs, max_new_tokens=4)[:, prompt:]  # (batch, tokens)
        refused = scores >= threshold  # (batch,)
        torch.testing.assert_close(found.unsafe_probability, scores, rtol=0.0, atol=1e-5)
        assert torch.equal(found.logits[~refused], stock(**inputs).logits[~refused])
        guarded.check_answers(said, stock.generate(**inputs, max_new_tokens=4)[:, prompt:], refused)

    run()


def left_open(ids: list[int], sasa: dict[str, Any]) -> bool:
    """Whether a prompt ends in a turn that a part of the generation prompt opens."""
    opening, ends = sasa["generation_prompt_ids"], set(sasa["turn_token_ids"])
    last = max((place for place, token in enumerate(ids) if token in ends), default=-1)
    return last >= 0 and ids[last] == opening[0] and ids[last : last + len(opening)] != opening


@each_reach
@every_family
def test_raw_completions(guard: Callable[..., Guard], family: str, options: dict[str, Any]) -> None:
    """Tokens in any order, with generation prompts, ends of turns and answers that are given in part."""
    guarded = guard(family, **options)
    sasa = guarded.model.config.sasa
    opening, refusal = sasa["generation_prompt_ids"], sasa["refusal_token_ids"]
    special = [*opening, *sasa["turn_token_ids"], *refusal]
    parts = [opening, opening, refusal[:2], *([token] for token in special), *([token] for token in range(60, 120))]
    prompts = st.lists(st.sampled_from(parts), min_size=2, max_size=16).map(
        lambda found: [token for part in found for token in part]
    )

    @examples(40)
    @given(prompts, st.booleans())
    @torch.no_grad()
    def run(ids: list[int], above: bool) -> None:
        whole = torch.tensor([ids])  # (1, tokens)
        prefix = whole[:, : judged(ids, sasa)]
        scores = guarded.expected({"input_ids": prefix, "attention_mask": torch.ones_like(prefix)})  # (1,)
        inputs = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
        with guarded.at(threshold_at(scores, 0, above)):
            found = guarded.model(**inputs)
            with begun_answers_allowed(guarded.model):
                said = guarded.model.generate(**inputs, max_new_tokens=4)[0, len(ids) :].tolist()
            if prefix.shape != whole.shape or left_open(ids, sasa):
                with pytest.raises(ValueError, match="begins the answer"):
                    guarded.model.generate(**inputs, max_new_tokens=4)
        torch.testing.assert_close(found.unsafe_probability, scores, rtol=0.0, atol=1e-5)
        if above:
            assert torch.equal(found.logits, guarded.stock(**inputs).logits)
            assert said == guarded.stock.generate(**inputs, max_new_tokens=4)[0, len(ids) :].tolist()
        else:
            assert set(said) <= {*refusal, *guarded.ends}

    run()


@pytest.mark.slow
@pytest.mark.xdist_group("onnx-llava")
def test_conversations_in_onnx(split: Callable[[str], Guard], exported: Callable[..., Any]) -> None:
    """The graphs say what torch says."""
    guarded = split("llava")
    runner, threshold = Runner(exported(guarded.directory)), guarded.model.config.sasa["threshold"]

    @examples(40)
    @given(batches)
    @torch.no_grad()
    def run(batch: Chats) -> None:
        inputs = encoded(guarded, batch)
        scores = guarded.expected(inputs)  # (batch,)
        assume((scores - threshold).abs().min() > 1e-3)
        runner.ask(guarded, inputs)
        assert runner.probability is not None
        np.testing.assert_allclose(runner.probability, scores.numpy(), rtol=0, atol=1e-4)
        said = torch.from_numpy(runner.logits).argmax(-1)  # (batch,)
        assert torch.equal(said == guarded.refusal[0], scores >= threshold)

    run()
