"""Decoders of onnxruntime-genai's builder, patched, in stock onnxruntime-genai: they judge, refuse and answer."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from foreign_runner import Decoder
from test_foreign_graphs import GRAPHS, Case, case
from test_onnx_genai import HERE, PYTHON, TOKENS

__all__ = ["case"]  # a fixture
# Of several types, with the embedding and without; blocks with a convolution.
NAMES = ("builder/llama", "builder/llama-int4", "builder/llama-float16", "builder/qwen3", "builder/lfm2")
TRIED = [graph for graph in GRAPHS if graph.values[0] in NAMES or "genai/" in graph.values[0]]
every = pytest.mark.parametrize("where", TRIED or GRAPHS)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PYTHON.parent.parent / ".installed").exists(),
        reason=f"NO ONNXRUNTIME-GENAI IN {PYTHON.parent.parent}: that it judges graphs of others was NOT tested",
    ),
]


def ask(directory: Path, conversations: list[Any], **options: Any) -> Any:
    """What is said in each turn of each conversation, of turns' rows of ids."""
    common = {"pixels": None, "places": 0, "tokens": TOKENS, "options": {"max_length": 200, **options}}
    requests = [{"turns": turns, **common} for turns in conversations]
    command = [PYTHON, HERE / "genai" / "ask.py", directory]
    result = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, check=False)
    assert result.returncode == 0, (result.returncode, result.stderr[-2000:])
    return json.loads(result.stdout.strip().splitlines()[-1])


def wanted(it: Case, ids: list[int], probability: float) -> list[int]:
    """The refusal, or what the original says in onnxruntime."""
    if probability >= it.threshold:
        return it.refusal[:TOKENS]
    stock: Decoder = it.ask(it.original, ids)
    return stock.answer(TOKENS)


@every
@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}], ids=["whole", "chunks"])
def test_prompts(options: dict[str, int], where: str, case: Any) -> None:
    it = case(where)
    for (found,), ids, expected in zip(
        ask(it.patched, [[[ids]] for ids in it.rows], **options), it.rows, it.expected, strict=True
    ):
        assert found["probability"] == pytest.approx([expected], abs=it.tolerance)
        (said,), right = found["tokens"], wanted(it, ids, expected)
        assert said[: len(right)] == right[: len(said)]


@every
def test_a_second_turn(where: str, case: Any) -> None:
    it = case(where)
    for first, expected in zip(it.rows, it.expected, strict=True):
        answer = wanted(it, first, expected)
        end = it.refusal[-1:] * (answer[-1] == it.refusal[-1])
        again = [*end, *it.rows[-1]]
        ((_, found),) = ask(it.patched, [[[first], [again]]])
        fed = answer[:-1] if end else answer
        assert found["probability"] == pytest.approx([it.judge([*first, *fed, *again])], abs=it.tolerance)
