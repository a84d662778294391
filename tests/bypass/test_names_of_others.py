"""Whatever another transformers calls otherwise: a guarded model refuses what it refused, or raises."""

import ast
import importlib.util
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Guard
from feeding import Loop
from matrix.bench import generate

MODELING = "modeling_sasa.py"
HOLDS, RAISES = "holds", "raises"


def words(source: str) -> list[str]:
    """The names of attributes, arguments and imports, and texts that could be such a name, of a modeling file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.alias):
            found |= set(node.name.split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add(node.value)
    return sorted(found - {"bool", "float", "torch", "transformers"})


@pytest.fixture(scope="module")
def answers(guard: Callable[..., Guard], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """What becomes of a model in whose code a word is another one, as if transformers called it otherwise."""
    guarded, root = guard("llava"), tmp_path_factory.mktemp("names")
    inputs = guarded.batch(images=True, count=2)
    source = (guarded.directory / MODELING).read_text()

    def tried(word: str) -> str:
        """HOLDS, RAISES, or what it answers where the refusal is due."""
        directory = shutil.copytree(guarded.directory, root / f"without_{word}")
        (directory / MODELING).write_text(re.sub(rf"(?<![\w/'.-]){word}(?!\w)|(?<=\.){word}(?!\w)", f"{word}_", source))
        return _answer(guarded, directory, inputs)

    return tried


@torch.no_grad()
def _answer(guarded: Guard, directory: Path, inputs: dict[str, Any]) -> str:
    """What is said through `generate` and by hand by rows that the threshold refuses."""
    try:
        # Not by an Auto class, which would take what it took before for this type of model.
        spec: Any = importlib.util.spec_from_file_location(directory.name, directory / MODELING)
        sys.modules[directory.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model: Any = module.SasaLlavaForConditionalGeneration.from_pretrained(directory)
        model.config.sasa["threshold"] = 1e-6
        by_hand = Loop(guarded, model).feed_prompt(inputs)
        said = [generate(model, inputs, max_new_tokens=6).tolist(), by_hand.say(6).tolist()]  # (2, 6) each
        return HOLDS if said == [[guarded.refusal[:6]] * 2] * 2 else f"generate, and by hand: {said}"
    except Exception:  # of any kind: it is loud
        return RAISES


@pytest.mark.slow
@pytest.mark.xdist_group("names")
def test_no_name_opens_the_gate(answers: Callable[[str], str], guard: Callable[..., Guard]) -> None:
    """Each name in the file that travels is changed in turn."""
    found = words((guard("llava").directory / MODELING).read_text())
    assert {"Cache", "attention_mask", "get_seq_length", "update", "layers"} <= set(found)
    became = {word: answers(word) for word in ["no_such_word", *found]}
    assert became["no_such_word"] == HOLDS and became["StaticLayer"] == RAISES
    opened = {word: said for word, said in became.items() if said not in (HOLDS, RAISES)}
    assert not opened, opened
    assert min(list(became.values()).count(end) for end in (HOLDS, RAISES)) > 50
