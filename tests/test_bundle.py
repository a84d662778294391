"""The modeling file that travels is the runtime's files one after another, and needs nothing of this project."""

import ast
from pathlib import Path

import pytest
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, LlavaConfig, LlavaForConditionalGeneration

from sasa_export import runtime
from sasa_export.runtime.bundle import PARTS, modeling_source

ROOM = Path(runtime.__file__).parent


def part(name: str) -> ast.Module:
    return ast.parse((ROOM / f"{name}.py").read_text())


def defined(tree: ast.Module) -> list[str]:
    """The names that a module gives itself, but those that it imports."""
    targets = [getattr(node, "targets", [getattr(node, "target", node)]) for node in tree.body]
    names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    flat = [
        name for some in targets for one in some for name in ast.walk(one) if isinstance(one, (ast.Name, ast.Tuple))
    ]
    return names + [name.id for name in flat if isinstance(name, ast.Name)]


def test_every_file_of_the_runtime_travels() -> None:
    assert sorted(path.stem for path in ROOM.glob("*.py")) == sorted([*PARTS, "__init__", "bundle"])


def test_no_name_stands_for_two_things() -> None:
    """In one file a second definition would replace the first one unseen."""
    names = [name for one in PARTS for name in defined(part(one))]
    assert "WANTED" in names and "current_recording" in names and "GuardedModel" in names
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})


@pytest.mark.parametrize("name", PARTS)
def test_a_part_imports_parts_before_it_by_their_names(name: str) -> None:
    for node in ast.walk(part(name)):
        if isinstance(node, ast.Import):
            assert not any(alias.asname or alias.name.startswith("sasa_export") for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and not any(alias.asname for alias in node.names)
            if str(node.module).startswith("sasa_export"):
                package, _, other = str(node.module).rpartition(".")
                assert package == "sasa_export.runtime" and PARTS.index(other) < PARTS.index(name)


@pytest.mark.parametrize("name", PARTS)
def test_a_part_imports_at_its_top_alone(name: str) -> None:
    """What stands elsewhere is not taken out where the parts are joined."""
    top, below = part(name).body, [node for one in part(name).body for node in ast.iter_child_nodes(one)]
    kinds = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in top[1:]]
    assert kinds == sorted(kinds, reverse=True)
    assert not any(isinstance(node, (ast.Import, ast.ImportFrom)) for one in below for node in ast.walk(one))


@pytest.mark.parametrize(
    ("config", "model"),
    [(LlavaConfig, LlavaForConditionalGeneration), (Gemma3Config, Gemma3ForConditionalGeneration)],
)
def test_the_joined_file_holds_all_and_stands_alone(config: type, model: type) -> None:
    source = modeling_source(config, model)
    tree = ast.parse(source)
    assert "sasa_export" not in source
    missing = {name for one in PARTS for name in defined(part(one))} - set(defined(tree))
    assert not missing
    for one in PARTS:  # comments travel too
        text = (ROOM / f"{one}.py").read_text()
        for line in text.splitlines():
            if line.lstrip().startswith("#"):
                assert line in source
    first = next(node for node in tree.body if isinstance(node, ast.If))
    before = [ast.unparse(node) for node in tree.body[1 : tree.body.index(first)]]
    assert before == ["import transformers"], "another transformers may lack what is imported later"
