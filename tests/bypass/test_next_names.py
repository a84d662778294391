"""On a transformers without the names that it deprecates (next_names.py), which has to be a process of its own."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import Guard
from feeding import CACHE
from matrix.bench import generate
from transformers import DynamicCache

TESTS = Path(__file__).parents[1]
THERE = "next_names" in sys.modules
# On LLaVA: that it loads, which takes a proof there, and judges, refuses and answers as the oracle says, by `generate`
# and by hand; and the rows of the matrix that change what is handed over.
RUN = ["bypass/test_next_names.py", "runtime/test_oracle.py", "runtime/test_feeding.py", "bypass/test_matrix.py"]
ONLY = (
    "llava and not llava_next and not onnx and "
    "(test_next_names or test_oracle or test_feeding or by_hand or the_cache or decoder_makes or call_behind)"
)


@pytest.mark.timeout(1800)  # a minute on a quiet machine
@pytest.mark.skipif(THERE, reason="it runs the others there")
def test_the_gate_holds_there() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "next_names", "-m", "not slow", "-k", ONLY]
    others = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [*command, *(str(TESTS / path) for path in RUN)], capture_output=True, text=True, cwd=TESTS.parent,
        env={**others, "PYTHONPATH": paths}, check=False,
    )  # fmt: skip
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout[-5000:] + ran.stderr[-2000:]


@pytest.mark.skipif(not THERE, reason="the name is known here")
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_the_old_name_is_no_way_past_the_gate(guard: Callable[..., Guard], use_cache: bool) -> None:
    """A forward takes it for any other argument: by it the model gets no past, and the gate has to say so."""
    assert CACHE == "cache"
    guarded = guard("llava")
    inputs = guarded.batch(images=False, count=1)
    with guarded.at(1e-6):
        first = guarded.model(**inputs, use_cache=True)
        assert first.logits[0, -1].argmax() == guarded.refusal[0]
        token = {"input_ids": torch.tensor([guarded.refusal[:1]]), "use_cache": use_cache}
        mask = {"attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.int64)}
        for further in ({}, mask):
            with pytest.raises(ValueError, match=r"has not judged what stands before|got two caches"):
                guarded.model(**token, **further, past_key_values=copy.deepcopy(first[CACHE]))
        with pytest.raises(ValueError, match="got two caches") if use_cache else nullcontext():
            unread = guarded.model(**inputs, use_cache=use_cache, past_key_values=DynamicCache())
            assert unread.logits[0, -1].argmax() == guarded.refusal[0]
        with pytest.raises(ValueError, match=r"`model_kwargs` are not used.*past_key_values"):
            generate(guarded.model, inputs, past_key_values=copy.deepcopy(first[CACHE]))
