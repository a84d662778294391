"""Says what of vLLM sasa-vllm relies on, and how that differs between versions. Wheels are opened, never installed.

python tools/vllm_names.py vllm-0.32.0-….whl vllm-0.33.0-….whl

What serving/src imports is read from its source; what else it overrides, wraps, calls or reads, and what calls that,
stands in vllm_names.toml. The others are compared with the first wheel. The exit status is 1 where a name is gone or
has another signature.
"""

import ast
import copy
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
SOURCE, TABLE = ROOT / "serving" / "src" / "sasa_vllm", Path(__file__).with_suffix(".toml")
FUNCTIONS, ASSIGNED = (ast.FunctionDef, ast.AsyncFunctionDef), (ast.Assign, ast.AnnAssign)
Name = tuple[str, str]  # a module of vLLM's, and a dotted name in it


class Wheel:
    """The Python source of one wheel."""

    def __init__(self, path: Path) -> None:
        self.files = zipfile.ZipFile(path)
        self.names = set(self.files.namelist())
        self.module = cache(self._module)

    def _module(self, name: str) -> ast.Module | None:
        path = name.replace(".", "/")
        found = next((file for file in (f"{path}.py", f"{path}/__init__.py") if file in self.names), None)
        return ast.parse(self.files.read(found)) if found else None

    def find(self, module: str, dotted: str) -> tuple[str, ast.AST] | None:
        """Where a name is defined, in this module, or in one that it comes from, or in a class that is inherited from,
        and its definition."""
        first, _, rest = dotted.partition(".")
        found = self._top(module, first, ())
        return self._member(*found, rest) if found and rest else found

    def _top(self, module: str, name: str, seen: tuple[Name, ...]) -> tuple[str, ast.AST] | None:
        tree = self.module(module)
        if tree is None or (module, name) in seen:
            return None
        seen, stars = (*seen, (module, name)), []
        package = module if f"{module.replace('.', '/')}/__init__.py" in self.names else module.rpartition(".")[0]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                up = package.rsplit(".", node.level - 1)[0] if node.level else ""
                source = ".".join(part for part in (up, node.module) if part)
                for alias in node.names:
                    if alias.name == "*":
                        stars.append(source)
                    elif (alias.asname or alias.name) == name and (got := self._top(source, alias.name, seen)):
                        return got
            elif isinstance(node, ast.Dict):  # vLLM's table of what it imports when it is asked for
                for key, value in zip(node.keys, node.values, strict=True):
                    if [getattr(key, "value", 0), isinstance(value, ast.Constant)] == [name, True]:
                        source, _, attribute = str(value.value).partition(":")  # type: ignore[attr-defined]
                        if source.startswith(".") and (got := self._top(package + source, attribute, seen)):
                            return got
        own = next((node for node in defined(tree.body) if name in names_of(node)), None)
        return (module, own) if own else next((got for star in stars if (got := self._top(star, name, seen))), None)

    def _member(self, module: str, owner: ast.AST, name: str) -> tuple[str, ast.AST] | None:
        if not isinstance(owner, ast.ClassDef):
            return None
        members = [*defined(owner.body), *(node for node in ast.walk(owner) if isinstance(node, ASSIGNED))]
        if own := next((node for node in members if {name, f"self.{name}"} & names_of(node)), None):
            return module, own
        parents = (self.find(module, ast.unparse(base).partition("[")[0]) for base in owner.bases)
        return next((got for parent in parents if parent and (got := self._member(*parent, name))), None)


def defined(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a body, and those under its conditions."""
    for node in body:
        yield node
        for inner in ("body", "orelse", "handlers") if isinstance(node, (ast.If, ast.Try)) else ():
            yield from defined(getattr(node, inner, []))


def names_of(node: ast.AST) -> set[str]:
    """What a statement defines."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    flat = [part for target in targets for part in getattr(target, "elts", [target]) if part]
    return {ast.unparse(part) for part in flat}


def parts_of(node: ast.AST) -> tuple[str, str]:
    """The signature of a definition, and its body, without comments, docstrings and annotations of arguments."""
    node = copy.deepcopy(node)
    for inner in ast.walk(node):
        if isinstance(inner, (*FUNCTIONS, ast.ClassDef)) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
        if isinstance(inner, ast.arg):
            inner.annotation = None
    if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return "", ""  # of an attribute, that it is there
    arguments = ", ".join(map(ast.unparse, node.bases if isinstance(node, ast.ClassDef) else [node.args]))
    return f"({arguments})", "\n".join(map(ast.unparse, node.body))


def relied_on(source: Path, table: Path) -> list[Name]:
    """Every name of vLLM that the Python files in `source` import, and those in the table."""
    nodes = [node for path in source.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    found = {(node.module or "", alias.name) for node in imports for alias in node.names}
    listed = tomllib.loads(table.read_text())
    more = {(f"vllm.{module}", name) for module, entry in listed.items() for name in entry["names"]}
    return sorted(more | {name for name in found if name[0].partition(".")[0] == "vllm"})


def compared(before: Wheel, after: Wheel, name: Name) -> str:
    """What became of a name: "same", "gone", or what differs."""
    old, new = (wheel.find(name[0], name[1].removesuffix("*")) for wheel in (before, after))
    if old is None or new is None:
        return "gone" if new is None else "differs: not in the first wheel"
    (signature, body), (another, other) = parts_of(old[1]), parts_of(new[1])
    if signature != another and not name[1].endswith("*"):
        return f"differs: signature, {signature} is now {another}"
    return "same" if (signature, body) == (another, other) else "differs: body"


@click.command(help=__doc__)
@click.argument("wheels", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--source", default=SOURCE, type=click.Path(path_type=Path), help="The source of sasa-vllm.")
@click.option("--table", default=TABLE, type=click.Path(path_type=Path), help="Further names.")
def main(wheels: tuple[Path, ...], source: Path, table: Path) -> None:
    first, wrong = Wheel(wheels[0]), False
    for path in wheels[1:] or wheels:
        click.echo(f"# {path.name}, compared with {wheels[0].name}")
        wheel = Wheel(path)
        for name in relied_on(source, table):
            verdict = compared(first, wheel, name)
            wrong = wrong or verdict == "gone" or "signature" in verdict
            click.echo(f"{'.'.join(name)}: {verdict}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
