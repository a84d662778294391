"""Directories in a process of their own, which has none of our code but theirs: as written, saved again, edited."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from cli_steps import settle
from conftest import Guard

# These tests share one child process, so they stay with one worker.
pytestmark = pytest.mark.xdist_group("fresh-process")

REFUSAL = "Sorry, never that."
NEW_TOKENS = 20

RUN = """
import builtins, json, sys
builtins.input = None  # nothing is asked, as at a terminal
import torch, transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
torch.set_num_threads(1)
found = {}
for name, (directory, threshold, new_tokens) in json.loads(sys.argv[1]).items():
    # In the order of README: before the model's code is known, the processor is loaded.
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if threshold is not None:
        model.config.sasa["threshold"] = threshold
    inputs = torch.load(directory + "/batch.pt")
    with torch.no_grad():
        probability = model(**inputs).unsafe_probability.tolist()
        answers = model.generate(**inputs, max_new_tokens=new_tokens)[:, inputs["input_ids"].shape[1]:]
    said = processor.batch_decode(answers, skip_special_tokens=True)
    parts = [type(part).__name__ for part in (model, processor, tokenizer, processor.image_processor)]
    try:
        getattr(transformers, parts[0].removeprefix("Sasa")).from_pretrained(directory)
        sealed = False
    except ValueError as error:
        sealed = "guarded by SASA" in str(error)
    found[name] = [parts, sealed, probability, answers.tolist(), said]
assert "sasa_export" not in sys.modules
print("\\n" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def runs(
    guard: Callable[..., Guard], fresh: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    """What each directory gave."""
    root = tmp_path_factory.mktemp("runs")
    jobs = {}
    for family in tiny.FAMILIES:
        guarded = guard(family)
        inputs = guarded.batch()
        with guarded.halved(inputs):
            threshold = guarded.model.config.sasa["threshold"]
        for name in ("written", "saved", "edited"):
            directory = shutil.copytree(guarded.directory, root / f"{family}_{name}")
            torch.save(inputs, directory / "batch.pt")
            jobs[f"{family} {name}"] = (str(directory), None if name == "edited" else threshold, NEW_TOKENS)
            if name == "saved":  # into a directory of the tokenizer and processor alone
                for path in (*directory.glob("*.safetensors*"), directory / "config.json"):
                    path.unlink()
                guarded.model.save_pretrained(directory)
            if name == "edited":
                settle(directory, threshold=threshold, refusal=REFUSAL)
    found = fresh(RUN, jobs)
    return lambda name: found[name]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("name", ["written", "saved", "edited"])
@torch.no_grad()
def test_a_directory_stands_alone(
    runs: Callable[[str], Any], guard: Callable[..., Guard], family: str, name: str
) -> None:
    """As written, as `save_pretrained` writes it again, and with threshold and refusal of the operator's: sealed, with
    the same P(unsafe), answers and processor, and a new refusal word for word."""
    guarded = guard(family)
    inputs = guarded.batch()
    with guarded.halved(inputs) as refused:
        answers = guarded.model.generate(**inputs, max_new_tokens=NEW_TOKENS)[:, inputs["input_ids"].shape[1] :]
    classes, sealed, probability, tokens, said = runs(f"{family} {name}")
    assert sealed
    torch.testing.assert_close(torch.tensor(probability), guarded.expected(inputs), rtol=0.0, atol=1e-5)
    if name == "edited":
        assert [text == REFUSAL for text in said] == refused.tolist()
    else:
        assert tokens == answers.tolist()
    processor: Any = guarded.processor
    stock = (processor, processor.tokenizer, processor.image_processor)
    assert classes == [f"Sasa{type(guarded.stock).__name__}", *(type(part).__name__ for part in stock)]
