"""The tool that compares wheels of vLLM, on wheels that are made up."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import vllm_names
from click.testing import CliRunner

BEFORE = {
    "__init__.py": 'LAZY = {"Registry": ".core:Registry"}\n',
    "core.py": "from .base import *\nfrom .base import helper as old\nclass Registry(Base):\n    kind: str\n",
    "base.py": """
class Base:
    def __init__(self, one):
        self.one = one
    def wait(self, one, two):
        "Words."
        return one + two  # words
def helper(one): ...
def around(one): ...
""",
}
NAMES = """["core"]
names = ["Registry.wait", "Registry.one", "Registry.kind", "old"]
["base"]
names = ["around*", "Base"]
"""


def run(tmp_path: Path, **after: str) -> tuple[int, dict[str, str]]:
    """The exit status, and what is said of each name, where vLLM's modules become others."""
    later = {**BEFORE, **{f"{name}.py": text for name, text in after.items()}}
    paths = [tmp_path / "before.whl", tmp_path / "after.whl"]
    for path, files in zip(paths, (BEFORE, later), strict=True):
        with zipfile.ZipFile(path, "w") as wheel:
            for name, text in files.items():
                wheel.writestr(f"vllm/{name}", text)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "one.py").write_text("import torch\nfrom vllm import Registry\nfrom click import echo\n")
    (tmp_path / "names.toml").write_text(NAMES)
    options = ["--source", str(tmp_path / "source"), "--table", str(tmp_path / "names.toml")]
    done = CliRunner().invoke(vllm_names.main, [*map(str, paths), *options])
    lines = [line.removeprefix("vllm.").split(": ", 1) for line in done.output.splitlines()[1:]]
    return done.exit_code, {name: verdict for name, verdict in lines}


def test_the_same(tmp_path: Path) -> None:
    base = BEFORE["base.py"].replace("Words", "Others").replace("# words", "").replace("one, two", "one: int, two")
    code, found = run(tmp_path, base=base)
    assert code == 0 and set(found.values()) == {"same"}
    assert set(found) == {
        "Registry", "core.Registry.wait", "core.Registry.one", "core.Registry.kind", "core.old", "base.around*",
        "base.Base",
    }  # fmt: skip


@pytest.mark.parametrize(
    "old, new, name, verdict, code",
    [
        ("one + two", "two + one", "core.Registry.wait", "differs: body", 0),
        ("one, two", "one, two, three=0", "core.Registry.wait", "differs: signature, (self, one, two) is now", 1),
        ("def wait", "def last", "core.Registry.wait", "gone", 1),
        ("self.one", "self.none", "core.Registry.one", "gone", 1),
        ("def helper", "def help", "core.old", "gone", 1),
        ("around(one)", "around(two)", "base.around*", "differs: body", 0),
        ("one + two", "two + one", "base.Base", "differs: body", 0),
        ("class Base:", "class Base(int):", "base.Base", "differs: signature", 1),
    ],
)
def test_another(tmp_path: Path, old: str, new: str, name: str, verdict: str, code: int) -> None:
    found_code, found = run(tmp_path, base=BEFORE["base.py"].replace(old, new))
    assert found[name].startswith(verdict) and found_code == code
