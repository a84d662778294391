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


def _answer(guarded: Guard, directory: Path, inputs: dict[str, Any]) -> str:
    """What is said through `generate` and by hand by rows that the threshold refuses."""
    try:
        # Not by an Auto class, which would take what it took before for this type of model.
        spec: Any = importlib.util.spec_from_file_location(directory.name, directory / MODELING)
        sys.modules[directory.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model: Any = module.SasaLlavaForConditionalGeneration.from_pretrained(directory)
        model.config.sasa["threshold"] = 1e-6
        said = model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]  # (2, 6)
        if said.tolist() != [guarded.refusal[:6]] * 2:
            return f"generate says {said.tolist()}"
        return _by_hand(guarded, model, inputs)
    except Exception:  # of any kind: it is loud
        return RAISES


@torch.no_grad()
def _by_hand(guarded: Guard, model: Any, inputs: dict[str, Any]) -> str:
    output, mask = model(**inputs, use_cache=True), inputs["attention_mask"]
    for wanted in guarded.refusal[:4]:
        token = output.logits[:, -1].argmax(-1, keepdim=True)  # (2, 1)
        if token.tolist() != [[wanted]] * 2:
            return f"by hand it says {token.tolist()} where {wanted} is due"
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        output = model(input_ids=token, attention_mask=mask, past_key_values=output.past_key_values, use_cache=True)
    return HOLDS


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
