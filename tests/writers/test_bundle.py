"""The modeling file that travels is the runtime's files one after another, and needs nothing of this project."""

import ast
from pathlib import Path

import pytest
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, LlavaConfig, LlavaForConditionalGeneration

from sasa_export import runtime
from sasa_export.runtime.bundle import PARTS, modeling_source

DIRECTORY = Path(runtime.__file__).parent


def part(name: str) -> ast.Module:
    return ast.parse((DIRECTORY / f"{name}.py").read_text())


def defined(tree: ast.Module) -> list[str]:
    """The names that a module gives itself, but those that it imports."""
    names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    return names + [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def test_every_file_of_the_runtime_travels_and_no_name_stands_for_two_things() -> None:
    """In one file a second definition would replace the first one unseen."""
    assert sorted(path.stem for path in DIRECTORY.glob("*.py")) == sorted([*PARTS, "__init__", "bundle"])
    names = [name for one in PARTS for name in defined(part(one))]
    assert {"WANTED", "current_recording", "GuardedModel"} <= set(names)
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


@pytest.mark.parametrize("name", PARTS)
def test_imports_of_a_part_can_be_taken_out(name: str) -> None:
    """They stand at its top, name what they take, and take only from parts before it."""
    body = part(name).body
    kinds = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in body[1:]]
    assert kinds == sorted(kinds, reverse=True)
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in imports:
        assert not any(alias.asname or alias.name.startswith("sasa_export") for alias in node.names)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("sasa_export"):
            package, _, other = str(node.module).rpartition(".")
            assert package == "sasa_export.runtime" and PARTS.index(other) < PARTS.index(name)


@pytest.mark.parametrize(
    ("config", "model"),
    [(LlavaConfig, LlavaForConditionalGeneration), (Gemma3Config, Gemma3ForConditionalGeneration)],
)
def test_the_joined_file_holds_all_and_stands_alone(config: type, model: type) -> None:
    source = modeling_source(config, model)
    tree = ast.parse(source)
    assert "sasa_export" not in source
    assert {name for one in PARTS for name in defined(part(one))} <= set(defined(tree))
    comments = [
        line for one in PARTS for line in (DIRECTORY / f"{one}.py").read_text().splitlines() if line.lstrip()[:1] == "#"
    ]
    assert all(line in source for line in comments)
    first = next(node for node in tree.body if isinstance(node, ast.If))
    before = [ast.unparse(node) for node in tree.body[1 : tree.body.index(first)]]
    assert before[0] == "import transformers" and len(before) == 2, (
        "another transformers may lack what is imported later"
    )
