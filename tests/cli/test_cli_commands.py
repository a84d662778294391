"""The command line itself: help, and the commands beside the main one: trace and verify."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from cli_steps import copied, fails, flags, invoke, offline, settle, succeeds

from sasa_export.models import family as families

# --------------------------------------------------------------------------------------------------- help


def test_help_needs_no_heavy_import() -> None:
    """`--help` is quick because of what it does not import: a clock would say so only on an idle machine."""
    code = (
        "import sys\nfrom sasa_export.cli import main\n"
        "for arguments in (['--help'], ['--help-all'], ['trace', '--help'], ['--version']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'scipy', 'onnx', 'onnxruntime', 'matplotlib', 'PIL', 'numpy'}\n"
        "print('imported:', sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "imported: []"
    code = "import sys, sasa_export.probe.intervals; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_shows_the_common_options_and_help_all_the_rest() -> None:
    common, every = succeeds("--help").stdout, succeeds("--help-all").stdout
    for flag in ("--model", "--out", "--safety-layer", "--calibration", "--probe", "--device", "--help-all"):
        assert flag in common and flag in every
    for flag in ("--regularization", "--projection", "--opset", "--batch-size", "--link"):
        assert flag not in common and flag in every
    for command in ("evaluate", "locate", "trace", "verify"):
        assert f"\n  {command} " in common and f"\n  {command} " in every


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--model", "x"], "Missing option '--out'"),
        (["--model", "x", "--out", "y", "--dtype", "int3"], "'int3' is not one of"),
        (["--model", "x", "--out", "y", "--threshold", "nan"], "'--threshold': nan is no number"),
        (["locate", "--model", "x", "--out", "y", "--limit", "0"], "0 is not in the range x>=1"),
        (["--model", "x", "--out", "y", "--no-such-option"], "No such option"),
    ],
)
def test_usage_errors(arguments: list[str], said: str) -> None:
    """click's own exit code and usage lines, and a last line that says what is wrong."""
    result = invoke(*arguments)
    assert result.exit_code == 2 and result.stderr.splitlines()[-1].startswith("Error:") and said in result.stderr


# ---------------------------------------------------------------------------------------- trace


def test_trace(llava: Path) -> None:
    """Every node on a line with its module and inputs, and the decoder drawn before and after."""
    said = ("--safety-layer", "1", "--semantic-layer", "3", "--lane-tokens", "8")
    printed = succeeds("trace", "--model", str(llava), *said).stdout
    listed, before, after = printed.split("```mermaid")
    assert len([line for line in listed.splitlines() if "<-" in line]) == tiny.LAYERS + 5
    row = next(line.split() for line in listed.splitlines() if line.split()[:1] == ["layers.3"])
    assert row[1:3] == ["block", "model.language_model.layers.3"] and row[-1] == "layers.2"
    assert "safety layer 1, semantic layer 3 (given by the user)" in listed
    assert '["blocks 0 to 5"]' in before and '["second lane: blocks 2 to 5"]' in after
    assert '["projection, last 8 tokens"]' in after


GOOD = 'model_types = ["x"]\nfiles = []\n[modules]\n' + "\n".join(f'{role} = "m"' for role in families.MODULES)


@pytest.mark.parametrize(
    "text, said",
    [
        ("[", "fam.toml: "),
        (GOOD.replace("files", "fils"), "files is missing"),
        (GOOD.replace("norm", "nrm"), "norm is missing"),
        (GOOD.replace("files", "layer = []\nfiles"), "unexpected keyword argument 'layer'"),
        (GOOD.replace("files", 'mlx = ["y"]\nfiles'), "y is not among model_types"),
        (GOOD + '\n[onnx]\nmodel_types = ["x"]\ntower = "Qwen"', "a module and a class, with a dot between"),
        (GOOD + '\n[aliases]\nq.5 = "a/b"', "an alias with a dot needs quotes"),
        (
            GOOD + '\n[[layers]]\ncheckpoint = "a/b"\nblocks = 4\nhidden = 8\nsafety = 3\nsemantic = 3\nsource = "x"',
            "layers of a/b need 0 <= safety < semantic < blocks",
        ),
    ],
)
def test_a_family_file_with_a_mistake(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "fam.toml"
    path.write_text(GOOD)
    assert families.read(path).modules["norm"] == "m"
    path.write_text(text)
    with pytest.raises(families.SasaExportError, match=r"graphs/README\.md") as caught:
        families.read(path)
    assert said in str(caught.value)


# ------------------------------------------------------------------------------------------------- verify


def test_verify_of_a_good_directory(patched: Path) -> None:
    assert "✗" not in succeeds("verify", str(patched), "--files").stderr


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("threshold", 0.25, "as the operator changed them"),
        ("refusal", "No.", "as the operator changed them"),
        ("epsilon", 1.0, "1 differ: config.json"),
    ],
)
def test_verify_of_an_operators_edit(patched: Path, tmp_path: Path, entry: str, value: Any, said: str) -> None:
    """Threshold and refusal are the operator's to change, however the file is laid out afterwards; nothing else is."""
    copy = copied(patched, tmp_path)
    settle(copy, **{entry: value})
    result = invoke("verify", str(copy), "--files")
    assert said in result.stderr and (result.exit_code == 0) == ("operator" in said), result.stderr


def test_verify_of_what_is_no_patched_directory(llava: Path, tmp_path: Path) -> None:
    for directory in (llava, tmp_path / "none", tmp_path):
        fails("verify", str(directory), "--files")


# ------------------------------------------------------------------------------------------------- a lean installation

# What README says may be left out.
LEFT_OUT = ("onnx", "onnx_ir", "onnxruntime", "onnxscript", "datasets", "pyarrow", "gguf")
LEAN = f"import sys; sys.modules.update(dict.fromkeys({LEFT_OUT})); from sasa_export.cli import main; main()"


@pytest.mark.slow
def test_safetensors_need_no_onnx_installed(llava: Path, probe: Path, place: Path) -> None:
    def lean(*options: str) -> Any:
        arguments = flags(llava, place / "out", *options, probe=probe, verify="files")
        command = [sys.executable, "-c", LEAN, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=offline(), timeout=120, check=False)

    assert lean().returncode == 0 and (place / "out" / "config.json").exists()
    result = lean("--format", "onnx", "--force")
    assert result.returncode == 1 and result.stderr.strip().splitlines()[-1] == (
        "Error: this needs the package onnx, which is not installed. "
        "Install it, or sasa-export again with all that it asks for."
    )
