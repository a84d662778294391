"""Options in any combination: the work begins, or there is an error of one line, never a traceback.

Each command runs as far as it goes without loading a model. `SASA_FUZZ=1000` tries so many (`make fuzz`); a few by
default.
"""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from records import note
from test_faults import write_prompts

from sasa_export import Options
from sasa_export.cli import main
from sasa_export.errors import SasaExportError

quick = examples(12)
pytestmark = pytest.mark.xdist_group("llava")

STOPPED = "the work would begin here"
WORDS = (
    "", " ", "0", "-1", "1", "3", "5", "6", "99999999999999999999", "0.5", "1e400", "nan", "-inf", "auto", "none",
    "None", "true", "prompt", "every-token", "full", "both", "onnx", "int4", "float16", "cpu", "cuda:9", "meta", "..",
    "/", "a\nb", "\udc80", "ö" * 300, "--out", "-", "2:4", "4:2", "1-3", "3-1", "0-99", ",", ":", "jsonl:",
    "figstep:.", "os:system", "json:loads", "no.such:thing",
)  # fmt: skip

# No argument can hold a zero byte, and no place outside this module's folder may be written.
words = st.text(max_size=6).filter(lambda text: not text.startswith("/") and ".." not in text and "\0" not in text)


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path], guard: Callable[..., Any]
) -> dict[str, str]:
    """Paths that options may name, all of them this module's own: --out may name them too."""
    folder = tmp_path_factory.mktemp("options")
    for name in ("full", "here"):
        (folder / name).mkdir()
        (folder / name / "precious.txt").write_text("mine")
    shutil.copytree(tiny_model("llava"), folder / "model")
    shutil.copytree(guard("llava").directory, folder / "patched")
    shutil.copyfile(guard("llava").directory.parent / "probe.safetensors", folder / "probe.safetensors")
    found = {
        "model": folder / "model", "patched": folder / "patched", "probe": folder / "probe.safetensors",
        "prompts": write_prompts(folder, "calibration", 12), "data": write_prompts(folder, "data", 6),
        "full": folder / "full", "new": folder / "new", "copy": folder / "copy", "file": folder / "file.txt",
    }  # fmt: skip
    found["file"].write_text("not what you think")
    return {name: str(path) for name, path in found.items()}


@pytest.fixture
def stopped(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded, and a name means a place below the folder of this module."""
    monkeypatch.chdir(Path(places["full"]).parent / "here")

    def stop(*arguments: Any, **options: Any) -> None:
        raise SasaExportError(STOPPED)

    for place in ("pipeline.measure", "locate.run.load_model", "evaluate.run._features"):
        monkeypatch.setattr(f"sasa_export.{place}", stop)


def commands(places: dict[str, str]) -> dict[str, tuple[click.Command, list[str]]]:
    """Each command, and arguments with which it comes as far as it can."""
    model, out, prompts = ["--model", places["model"]], ["--out", places["new"]], ["--calibration", places["prompts"]]
    layers = ["--safety-layer", "2", "--semantic-layer", "4"]
    return {
        "export": (main, [*model, *out, *layers, *prompts]),
        "locate": (main.commands["locate"], ["locate", *model, *out, *prompts]),
        "evaluate": (
            main.commands["evaluate"],
            ["evaluate", "--model", places["patched"], *out, *prompts, "--data", places["data"]],
        ),
        "trace": (main.commands["trace"], ["trace", *model]),
        "verify": (main.commands["verify"], ["verify", places["patched"], "--files"]),
        "fetch": (
            main.commands["fetch"],
            ["fetch", *model, "--out", places["copy"]],
        ),  # last: it may replace the others
    }


def values(parameter: click.Parameter, places: dict[str, str]) -> st.SearchStrategy[list[str]]:
    """An option with what it may mean, or with something else."""
    flag = parameter.opts[0]
    if getattr(parameter, "is_flag", False):
        return st.just([flag])
    likely = list(places.values())
    if isinstance(parameter.type, click.Choice):
        likely = [str(choice) for choice in parameter.type.choices]
    texts = st.sampled_from(likely) | st.sampled_from(WORDS) | words
    return texts.map(lambda text: [flag, text])


def options_of(command: click.Command) -> list[click.Parameter]:
    """Those that are no arguments, load no weights and end no run by showing something."""
    return [
        parameter
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.name not in ("help", "version", "load")
    ]


@pytest.mark.parametrize("name", ["export", "locate", "evaluate", "trace", "verify", "fetch"])
def test_any_combination(places: dict[str, str], stopped: None, name: str) -> None:
    command, begin = commands(places)[name]
    each = [values(parameter, places) for parameter in options_of(command)]
    count: Counter[str] = Counter()

    @quick
    @given(st.lists(st.one_of(each), max_size=4), st.just("") | st.text("ab-= ", max_size=3))
    def run(more: list[list[str]], word: str) -> None:
        arguments = [*begin, *(part for option in more for part in option), *([word] if word else [])]
        count[ended(arguments)] += 1

    assert ended(begin) == ("done" if name in ("trace", "fetch", "verify") else "stopped")
    run()
    assert Path("precious.txt").read_text() == "mine", "the working directory was replaced"
    note("faults", group="fuzzing", what=f"options of {name}", tried=count.total(), of=None, good=True)


def ended(arguments: list[str]) -> str:
    """How a command ended, which was one of the ways that are allowed."""
    result = CliRunner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
    lines = result.stderr.splitlines()
    assert "Traceback" not in result.output, arguments
    if result.exit_code == 0:
        return "done"
    assert result.exit_code in (1, 2), (arguments, result.exit_code)
    errors = [line for line in lines if line.startswith("Error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0] and len(errors[0]) > 10, (arguments, result.stderr)
    return "stopped" if STOPPED in errors[0] else "refused"


def test_any_settings(tmp_path: Path) -> None:
    """The same from Python, where a value may also be of another type than its flag takes."""
    count: Counter[str] = Counter()
    numbers = st.integers(-3, 99) | st.floats() | st.sampled_from([10**30, -(10**30)])
    kinds: dict[str, st.SearchStrategy[Any]] = {}
    for entry in fields(Options):
        choices = entry.metadata.get("choices")
        kinds[entry.name] = st.sampled_from(choices) if choices else st.just(entry.default) | numbers
    kinds |= {"refusal": st.text(max_size=5), "regularization": st.text(max_size=4) | numbers.map(str)}
    kinds |= {name: st.none() | st.integers(-3, 99) | st.just("auto") for name in ("safety_layer", "semantic_layer")}
    kinds |= {"model": st.just("llava"), "out": st.just(tmp_path), "probe": st.none() | st.just(tmp_path)}
    kinds["calibration"] = st.just(()) | st.just(("a.jsonl",))
    kinds["further_pair"] = st.lists(st.sampled_from(["2:4", "1:3"]) | st.text(max_size=4), max_size=3).map(tuple)

    @quick
    @given(st.fixed_dictionaries({}, optional=kinds))
    def run(chosen: dict[str, Any]) -> None:
        try:
            Options(**chosen).check()
            count["taken"] += 1
        except SasaExportError as error:
            assert str(error).isprintable()
            count["refused"] += 1

    run()
    note("faults", group="fuzzing", what="settings in Python", tried=count.total(), of=None, good=True)
