"""Any call of a guarded model: for each row a verdict on its whole text, equal to that on the same text at once, or an
error. What transformers refuses by itself is an error too; what only the gate refuses says so in a sentence of ours.

`SASA_FUZZ=2000` draws so many calls (`make fuzz`); a few by default.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Guard
from feeding import CACHE
from fuzzing import examples, judged
from hypothesis import assume, example, given
from hypothesis import strategies as st
from matrix.bench import MARGIN
from matrix.ways import tuned
from torch import Tensor

OURS = ("guarded", "gate")  # words of our own errors
NEW = 3  # tokens that each answer may have
GIVEN = ("all of it", "new ids, all of the mask", "new ids, no mask", "new ids, their mask")
WORDS = [[token] for token in range(60, 120)]


@dataclass(frozen=True)
class Call:
    """One call, as it is drawn. Texts are lists of token ids."""

    texts: list[list[int]]  # of the rows
    turn: list[int]  # a second turn of the first row, on the cache that holds it; empty: none
    way: str
    attention: str
    cache: str
    mask: str
    side: str
    given: str  # what of a second turn is handed over
    kept: str  # what was done to the cache between two turns
    chunk: int | None
    virtual: int  # embeddings that are put in front, as PEFT's prompt tuning does
    embedded: bool
    streamed: bool
    above: bool  # the threshold, of the first row's P(unsafe)


def calls(opening: list[int], turns: list[int]) -> st.SearchStrategy[Call]:
    """Calls on texts that have the generation prompt `opening` at their end, amid them, or nowhere."""
    inside = st.lists(st.sampled_from([*WORDS, *WORDS, opening, *([token] for token in turns)]), min_size=1, max_size=8)
    text = st.builds(
        lambda parts, ends: [token for part in parts for token in part] + opening * ends, inside, st.booleans()
    )
    one, two = (st.lists(text, min_size=count, max_size=count) for count in (1, 2))
    return st.builds(
        Call,
        texts=one | two,
        turn=st.just([]) | text,
        way=st.sampled_from(["generate", "generate", "judge", "forward"]),
        attention=st.sampled_from(["sdpa", "eager", "flex_attention"]),
        cache=st.sampled_from(["dynamic", "dynamic", "static", "none"]),
        mask=st.sampled_from(["right", "right", "none", "bool", "float", "zeros", "hole", "short", "long", "wide"]),
        side=st.sampled_from(["left", "right"]),
        given=st.sampled_from(GIVEN),
        kept=st.sampled_from(["as it is", "copied", "cropped"]),
        chunk=st.sampled_from([None, None, 2, 5]),
        virtual=st.sampled_from([0, 0, 1, 3]),
        embedded=st.booleans(),
        streamed=st.booleans(),
        above=st.booleans(),
    )


def padded(texts: list[list[int]], side: str) -> dict[str, Tensor]:
    """Rows of token ids side by side: ids and mask, (rows, tokens) both."""
    width = max(map(len, texts))
    rows = [(text, [0] * (width - len(text))) for text in texts]
    ids = [pad + text if side == "left" else text + pad for text, pad in rows]
    real = [
        [0] * len(pad) + [1] * len(text) if side == "left" else [1] * len(text) + [0] * len(pad) for text, pad in rows
    ]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real)}


def masked(inputs: dict[str, Tensor], kind: str) -> dict[str, Any]:
    """The inputs with a mask of another kind."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].clone()  # (rows, tokens)
    if kind in ("zeros", "hole"):
        mask[0, ids.shape[1] // 3 : None if kind == "zeros" else 2 * ids.shape[1] // 3] = 0
        mask[0] *= kind == "hole"
    other: dict[str, Any] = {
        "none": None if mask.all() else mask, "bool": mask.bool(), "float": mask.float(), "short": mask[:, 1:],
        "long": torch.cat([mask[:, :1], mask], dim=1), "wide": mask[:, None].expand(-1, 2, -1),
    }  # fmt: skip
    return {"input_ids": ids, "attention_mask": other.get(kind, mask)}


@contextmanager
def attending(model: Any, attention: str) -> Iterator[None]:
    """The model with another attention; what it compiles is run as it is, since there may be no compiler."""
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    model.__dict__.pop("_cache", None)  # a static one is kept, and used again where it is large enough
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.set_attn_implementation(before)


@dataclass
class Outcome:
    texts: list[list[int]]  # what each row's verdict is to be on; empty: nothing
    probability: Tensor  # (rows,)
    refused: Tensor | None  # (rows,), where it was told
    said: list[list[int]]  # of each row
    streamed: int  # tokens that the streamer had got


class Caller:
    """Makes a drawn call on a model, guarded or not."""

    def __init__(self, model: Any, call: Call) -> None:
        self.model, self.call, self.streamed = model, call, list[Tensor]()
        self.virtual = model.get_input_embeddings()(torch.tensor([[61, 88, 70]]))[:, : call.virtual].detach()

    def make(self) -> Outcome:
        call, tuning = self.call, self.call.virtual and self.call.way == "generate"
        with attending(self.model, call.attention), tuned(self.model, self.virtual) if tuning else nullcontext():
            if call.turn:
                return self._second(*self._first())
            texts = call.texts[:1] if call.virtual else call.texts  # padding behind these would move positions
            inputs = masked(padded(texts, call.side), call.mask)
            return self._ask(inputs, [[], *texts[1:]] if call.mask == "zeros" else texts)

    def _first(self) -> tuple[list[int], Any]:
        """A first turn that no threshold refuses: what stands behind it, and the cache that holds it."""
        inputs, call = padded(self.call.texts, "left"), self.call
        if call.way == "forward":
            return call.texts[0], self.model(**inputs, use_cache=True)[CACHE]
        found = self.model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, eos_token_id=None)
        cache, history = found[CACHE], found.sequences[0].tolist()
        if call.kept == "copied":
            cache = copy.deepcopy(cache)
        elif call.kept == "cropped":
            cache.crop(-2)
        return history, cache

    def _second(self, history: list[int], cache: Any) -> Outcome:
        """A second turn on a kept cache. Behind `generate` the last token of the history was never fed."""
        call, past = self.call, cache.get_seq_length()
        whole = [*history, *call.turn]
        ids = whole if call.given == "all of it" and call.way != "forward" else whole[past:]
        count = len(ids) if call.given == "new ids, their mask" else len(whole)
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, count).long()}
        if call.given == "new ids, no mask":
            del inputs["attention_mask"]
        new = (*GIVEN[2:], *GIVEN[1:] * call.embedded)
        if call.way != "forward" and call.given in new:
            # transformers takes them for all, and leaves out as many as the cache holds.
            whole = [*whole[:past], *(ids[past:] or ids)]
        return self._ask({**inputs, CACHE: cache}, [whole])

    def _ask(self, inputs: dict[str, Any], texts: list[list[int]]) -> Outcome:
        call, width = self.call, inputs["input_ids"].shape[1]
        if call.embedded:
            inputs["inputs_embeds"] = self.model.get_input_embeddings()(
                inputs.pop("input_ids")
            )  # (rows, tokens, hidden)
            width = 0
        if call.way == "forward":
            found = self.model(**inputs, use_cache=call.cache != "none")
            said = found.logits[:, -1:].argmax(-1).tolist()
            return Outcome(texts, found.get("unsafe_probability"), None, said, 0)
        options: dict[str, Any] = {"use_cache": call.cache != "none", "prefill_chunk_size": call.chunk}
        if call.cache == "static" and CACHE not in inputs:
            options["cache_implementation"] = "static"
        if call.way == "judge":
            judge = getattr(self.model, "judge", self.model.generate)
            return Outcome(texts, judge(**inputs, **options), None, [[]] * len(texts), 0)
        if call.streamed:
            options["streamer"] = SimpleNamespace(put=self.streamed.append, end=lambda: None)
        found = self.model.generate(**inputs, **options, max_new_tokens=NEW, return_dict_in_generate=True)
        said = found.sequences[:, width:].tolist()
        return Outcome(texts, found.get("unsafe_probability"), found.get("refused"), said, len(self.streamed))


def score(guarded: Guard, call: Call, text: list[int]) -> float:
    """The oracle's P(unsafe) of a text at once, with what was put in front of it."""
    ids = torch.tensor([text])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if call.virtual and call.way == "generate":
        embedding = guarded.stock.get_input_embeddings()
        virtual = embedding(torch.tensor([[61, 88, 70]]))[:, : call.virtual]
        inputs = {"inputs_embeds": torch.cat([virtual, embedding(ids)], dim=1)}  # (1, tokens, hidden)
        inputs["attention_mask"] = torch.ones(inputs["inputs_embeds"].shape[:2]).long()
    return float(guarded.expected(inputs))


@torch.no_grad()
def check(guarded: Guard, call: Call) -> str:
    """What became of a call: "error" or "verdict". AssertionError where it is neither."""
    sasa = guarded.model.config.sasa
    if call.turn:
        call = replace(call, texts=call.texts[:1], virtual=0)
    first = score(guarded, call, call.texts[0])
    caller = Caller(guarded.model, call)
    threshold = first + (MARGIN if call.above else -MARGIN)
    assume(0 < threshold < 1)
    with guarded.at(threshold):
        try:
            outcome = caller.make()
        except Exception as error:
            for token in caller.streamed[1:2]:  # the first that was sampled
                assert call.turn or first < threshold or token in guarded.refusal, "it had left before a verdict"
            if not any(word in str(error) for word in OURS):
                with pytest.raises(type(error)):
                    Caller(guarded.stock, call).make()
            return "error"
    by_hand = call.way == "forward"
    for row, text in enumerate(outcome.texts):
        found = float(outcome.probability[row])
        said = set(outcome.said[row])
        if not text:  # what stands in front of it is real
            read = call.virtual and not by_hand and call.way == "generate"
            assert read or (found != found and said <= {*guarded.refusal, *guarded.ends}), "a row without a real token"
            continue
        begun = judged(text, sasa)
        if by_hand and found != found:  # a call that ends no prompt: a verdict came before
            assert call.turn and (len(call.turn) == 1 or begun <= len(call.texts[0]))
            continue
        assert by_hand or begun == len(text), "text behind the last generation prompt was not judged"
        if call.mask == "hole" and row == 0 and not call.turn:
            assert found == found
            continue
        expected = score(guarded, call, text[:begun])
        assert abs(found - expected) < MARGIN / 10, f"row {row}: {found} instead of {expected}"
        if abs(expected - threshold) > MARGIN / 2 and expected >= threshold:
            assert said <= {*guarded.refusal, *guarded.ends}, f"row {row} was refused, and says {said}"
        assert outcome.refused is None or bool(outcome.refused[row]) == (found >= threshold)
    return "verdict"


def test_any_call(guard: Callable[..., Guard]) -> None:
    guarded = guard("llava")
    sasa = guarded.model.config.sasa
    opening, turns = sasa["generation_prompt_ids"], sasa["turn_token_ids"]
    plain: dict[str, Any] = {
        "texts": [[60, 61, 62, *opening]], "turn": [], "way": "generate", "attention": "sdpa", "cache": "dynamic",
        "mask": "right", "side": "left", "given": "all of it", "kept": "as it is", "chunk": None, "virtual": 0,
        "embedded": False, "streamed": False, "above": False,
    }  # fmt: skip
    flex: dict[str, Any] = {"attention": "flex_attention", "cache": "static"}
    second: dict[str, Any] = {"texts": [[*range(60, 85), *opening]], "turn": [turns[0], *range(70, 90), *opening]}
    outcomes: list[str] = []

    @examples(60)
    @given(calls(opening, turns))
    @example(Call(**plain))
    @example(Call(**{**plain, "texts": [[60, *opening], [*range(60, 90), *opening]], **flex}))
    @example(Call(**{**plain, "texts": [[60, 61, *opening, 70, 71]]}))
    @example(Call(**{**plain, **second, "given": "new ids, no mask"}))
    @example(Call(**{**plain, "virtual": 3}))
    @example(Call(**{**plain, "mask": "zeros"}))
    def run(call: Call) -> None:
        outcomes.append(check(guarded, call))

    run()
    assert outcomes.count("verdict") > len(outcomes) / 4, "most calls are errors"
