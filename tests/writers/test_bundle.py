"""The modeling file that travels is the runtime's files one after another, and needs nothing of this project."""

import ast
from pathlib import Path

from transformers import LlavaConfig, LlavaForConditionalGeneration

from sasa_export import runtime
from sasa_export.runtime.bundle import PARTS, modeling_source

DIRECTORY = Path(runtime.__file__).parent


def defined(tree: ast.Module) -> list[str]:
    """The names that a module gives itself, but those that it imports."""
    names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    return names + [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def test_the_joined_file_holds_all_and_no_name_stands_for_two_things() -> None:
    """In one file a second definition would replace the first one unseen."""
    assert sorted(path.stem for path in DIRECTORY.glob("*.py")) == sorted([*PARTS, "__init__", "bundle"])
    texts = [(DIRECTORY / f"{part}.py").read_text() for part in PARTS]
    names = [name for text in texts for name in defined(ast.parse(text))]
    assert {"WANTED", "current_recording", "GuardedModel"} <= set(names)
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
    source = modeling_source(LlavaConfig, LlavaForConditionalGeneration)
    tree = ast.parse(source)
    assert set(names) <= set(defined(tree)) and "sasa_export" not in source
    comments = [line for text in texts for line in text.splitlines() if line.lstrip()[:1] == "#"]
    assert all(line in source for line in comments)
    first = next(node for node in tree.body if isinstance(node, ast.If))
    before = [ast.unparse(node) for node in tree.body[1 : tree.body.index(first)]]
    assert before[0] == "import transformers" and len(before) == 2, (
        "another transformers may lack what is imported later"
    )
