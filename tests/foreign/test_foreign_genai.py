"""Decoders of onnxruntime-genai's builder, patched, in stock onnxruntime-genai: they judge, refuse and answer."""

from typing import Any

import pytest
from foreign_runner import Decoder
from genai_runner import MISSING, TOKENS, WHY, ask
from test_foreign_graphs import GRAPHS, Case, case

__all__ = ["case"]  # a fixture
# Of several types, with the embedding and without; blocks with a convolution.
NAMES = ("builder/llama", "builder/llama-int4", "builder/llama-float16", "builder/qwen3", "builder/lfm2")
TRIED = [graph for graph in GRAPHS if graph.values[0] in NAMES or "genai/" in graph.values[0]]
every = pytest.mark.parametrize("where", TRIED or GRAPHS)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING, reason=WHY)]


def ask_both(it: Case, conversations: list[Any], **options: Any) -> Any:
    """What is said in each turn of each conversation, of turns' rows of ids, where the original says anything."""
    try:
        ask(it.original, conversations[:1], **options)
    except AssertionError as error:
        pytest.skip(f"the original does not run: {str(error)[-200:]}")
    return ask(it.patched, conversations, **options)


def wanted(it: Case, ids: list[int], probability: float) -> list[int]:
    """The refusal, or what the original says in onnxruntime."""
    if it.refuses(probability):
        return it.refusal[:TOKENS]
    stock: Decoder = it.ask(it.original, ids)
    return stock.answer(TOKENS)


@every
@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}], ids=["whole", "chunks"])
def test_prompts(options: dict[str, int], where: str, case: Any) -> None:
    it = case(where)
    said_to = ask_both(it, [[[ids]] for ids in it.rows], **options)
    for (found,), (ids, expected) in zip(said_to, it.judged, strict=True):
        assert found["probability"] == pytest.approx([expected], abs=it.by_call)
        (said,), right = found["tokens"], wanted(it, ids, expected)
        assert said[: len(right)] == right[: len(said)]


@every
def test_a_second_turn(where: str, case: Any) -> None:
    it = case(where)
    for first, expected in it.judged:
        answer, ending = wanted(it, first, expected), it.refusal[-1]
        ended = ending in answer
        fed = answer[: answer.index(ending)] if ended else answer  # it does not feed the token that ends an answer
        again = [*[ending] * ended, *it.rows[-1]]
        ((_, found),) = ask_both(it, [[[first], [again]]])
        assert found["probability"] == pytest.approx([it.probe.judge([*first, *fed, *again])], abs=it.by_call)
