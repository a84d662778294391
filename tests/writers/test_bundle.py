"""The modeling file that travels is the runtime's files one after another, and needs nothing of this project."""

import ast
from pathlib import Path

from transformers import LlavaConfig, LlavaForConditionalGeneration

from sasa_export import runtime
from sasa_export.runtime.bundle import MLX_PARTS, PARTS, mlx_source, modeling_source

DIRECTORY = Path(runtime.__file__).parent


def defined(tree: ast.Module) -> list[str]:
    """The names that a module gives itself, but those that it imports."""
    names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    return names + [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


def test_the_joined_files_hold_all_and_no_name_stands_for_two_things() -> None:
    """In one file a second definition would replace the first one unseen."""
    assert {path.stem for path in DIRECTORY.glob("*.py")} == {*PARTS, "__init__", "bundle"}
    others = (DIRECTORY / "../runtime_mlx").resolve().glob("*.py")
    assert {path.stem for path in others} - {"__init__"} == {Path(part).name for part in MLX_PARTS if "/" in part}
    torch_source = modeling_source(LlavaConfig, LlavaForConditionalGeneration)
    for parts, source in ((PARTS, torch_source), (MLX_PARTS, mlx_source())):
        names = [name for part in parts for name in defined(ast.parse((DIRECTORY / f"{part}.py").read_text()))]
        assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})
        assert set(names) <= set(defined(ast.parse(source))) and "sasa_export" not in source
    assert "torch" not in imported(mlx_source())


def test_the_version_is_looked_at_before_other_imports() -> None:
    """Another transformers may lack what is imported later."""
    tree = ast.parse(modeling_source(LlavaConfig, LlavaForConditionalGeneration))
    first = next(node for node in tree.body if isinstance(node, ast.If))
    before = [ast.unparse(node) for node in tree.body[1 : tree.body.index(first)]]
    assert before[0] == "import transformers" and len(before) == 2


def imported(source: str) -> set[str]:
    """The first parts of the modules that a source imports."""
    nodes = list(ast.walk(ast.parse(source)))
    whole = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {
        name.partition(".")[0] for name in [*whole, *(str(n.module) for n in nodes if isinstance(n, ast.ImportFrom))]
    }
