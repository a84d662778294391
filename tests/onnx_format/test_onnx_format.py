"""`--format onnx` and `both`, from the command line to a verified directory, and what `verify` says of a changed one.

The model has three blocks, since exporting a block takes seconds.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from cli_steps import flags, flip, invoke, succeeds
from onnx_runner import lane_of

from sasa_export.onnx import plain
from sasa_export.verify import compare

Tiny = Callable[..., Path]
Words = Callable[..., list[str]]
REFUSAL = "I will not help."
pytestmark = pytest.mark.xdist_group("onnx-format")  # its two exports are shared


@pytest.fixture(scope="module")
def words(tiny_model: Tiny, probe: Path) -> Callable[..., list[str]]:
    """`words(out, **options)`: the arguments of an export."""
    common = {"safety_layer": 0, "semantic_layer": 1, "probe": probe, "refusal": REFUSAL}
    model = tiny_model("llava", num_hidden_layers=3)
    return lambda out, **options: flags(model, out, **{**common, "format": "onnx", "verify": "files", **options})


@pytest.fixture(scope="module")
def both(words: Words, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A llava in both formats, its weights kept outside the graphs, and what the command said."""
    place = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "EXTERNAL_ABOVE", 1024)
        patch.setattr(plain, "SMALL", 64)
        said = succeeds(*words(place / "out", format="both", verify="full")).stderr
    assert [path.name for path in place.iterdir()] == ["out"]
    return place / "out", said


def test_both_are_complete_and_do_not_contradict_each_other(both: tuple[Path, str]) -> None:
    out, said = both
    assert sorted(path.name for path in out.iterdir()) == ["onnx", "safetensors"]
    configs = {}
    for name in ("onnx", "safetensors"):
        manifest = json.loads((out / name / "sasa-export.json").read_text())
        assert manifest["options"]["format"] == "both"
        assert manifest["options"]["opset"] == 23
        present = {path.relative_to(out / name).as_posix() for path in (out / name).rglob("*") if path.is_file()}
        assert set(manifest["files"]) == present - {"sasa-export.json"}
        assert REFUSAL in (out / name / "README.md").read_text()
        configs[name] = json.loads((out / name / "config.json").read_text())
    assert configs["onnx"]["sasa"].items() >= configs["safetensors"]["sasa"].items()
    assert configs["onnx"]["sasa"]["graphs"]["decoder"] == "onnx/decoder_model_merged.onnx"
    external = {"decoder_model_merged": 1, "embed_tokens": 1, "vision_encoder": 1}
    told = {"dtype": dict.fromkeys(external, "fp32"), "use_external_data_format": external}
    assert configs["onnx"]["transformers.js_config"] == told
    sizes = {path.name: path.stat().st_size for path in (out / "onnx" / "onnx").iterdir()}
    assert sizes["decoder_model_merged.onnx_data"] > 100_000
    assert sizes["embed_tokens_and_features.onnx"] < 10_000 < sizes["embed_tokens.onnx_data"], "a table stored twice"
    assert [path.name for path in (out / "onnx").glob("*.safetensors")] == ["sasa-probe.safetensors"]
    assert "✗" not in said
    for line in (
        r"✓ the graph checker passes: 4 of 4 graphs",
        r"✓ P\(unsafe\) is the original's: .* tolerance 0.0001 \(float32 on CPU\w+, float32 original\)",
        r"✓ allowed prompts have the original's logits: largest difference \d\.\de-0[5-9]",
    ):
        assert re.search(line, said), line
    onnx_part = said.split("the graph checker passes")[1]
    for name in ("refused prompts say the refusal", "allowed prompts are answered as by the original"):
        match = re.search(rf"✓ {name}: (\d+) of (\d+)", onnx_part)
        assert match and match[1] == match[2] and int(match[1]) > 0, "both verdicts must have been seen"


def test_what_the_branch_holds_stays_in_the_graph(both: tuple[Path, str]) -> None:
    """onnxruntime-web would look for its file in vain."""
    decoder = ir.load(both[0] / "onnx" / "onnx" / "decoder_model_merged.onnx")
    inside = [value.const_value for value in lane_of(decoder).initializers.values()]
    assert any(tensor is not None and tensor.nbytes > 64 for tensor in inside)
    assert not any(isinstance(tensor, ir.ExternalTensor) for tensor in inside)


def test_verify_knows_each_of_them(both: tuple[Path, str]) -> None:
    said = succeeds("verify", str(both[0]), "--files").stderr
    assert said.count("files are those that were exported") == 2 and said.count("the graph checker passes") == 1


def test_verify_again_and_after_one_byte_of_data(both: tuple[Path, str], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(both[0] / "onnx", tmp_path / "copy"))
    assert "allowed prompts are answered as by the original" in succeeds("verify", str(copy)).stderr
    flip(copy / "onnx" / "decoder_model_merged.onnx_data", -1000)
    result = invoke("verify", str(copy), "--files")
    assert result.exit_code == 1 and "1 differ: onnx/decoder_model_merged.onnx_data" in result.stderr


def test_verify_of_graphs_that_somebody_quantized(both: tuple[Path, str], tmp_path: Path) -> None:
    """The files say that they are others, and a run says what became of the verdicts."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    copy = Path(shutil.copytree(both[0] / "onnx", tmp_path / "copy"))
    path = copy / "onnx" / "decoder_model_merged.onnx"
    quantizer = MatMulNBitsQuantizer(onnx.load(path), bits=4, block_size=32, is_symmetric=True)
    quantizer.process()
    onnx.save(quantizer.model.model, path)
    result = invoke("verify", str(copy))
    assert result.exit_code == 1
    for line in (
        r"✗ files are those that were exported: 1 differ: onnx/decoder_model_merged.onnx",
        r"✗ P\(unsafe\) is the original's: largest difference",
        r"[✓✗] verdicts are the original's: \d+ of \d+ outside the tolerance of the threshold; \d+ of \d+ changed",
        r"failed its verification. Do not serve it; export the model again.",
    ):
        assert re.search(line, result.stderr), line
    (copy / "sasa-export.json").unlink()
    path.write_bytes(b"no graph")
    result = invoke("verify", str(copy))
    assert result.exit_code == 1 and "✗ the decoder holds the gate" in result.stderr


def test_the_cards_own_python(both: tuple[Path, str], tmp_path: Path) -> None:
    """The snippet of the card runs as it stands, on a prompt that the graph refuses."""
    directory = both[0] / "onnx"
    written = json.loads((directory / "sasa-verify" / "cases.json").read_text())
    threshold = json.loads((directory / "config.json").read_text())["sasa"]["threshold"]
    case = next(
        c
        for c in written["cases"]
        if c["image"] and len(c["messages"]) == 1 and c["unsafe_probability"] > threshold + 0.05
    )
    shutil.copyfile(directory / "sasa-verify" / case["image"], tmp_path / "picture.png")
    code = re.findall(r"```python\n(.*?)```", (directory / "README.md").read_text(), re.DOTALL)[0]
    code = code.replace("<this directory>", str(directory))
    code = code.replace("Follow the instruction shown in the image.", case["messages"][-1]["content"][-1]["text"])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip() == REFUSAL


@pytest.mark.slow
def test_a_calibrated_export_counts_changed_verdicts(
    tiny_model: Tiny, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX alone, with the old opset: the graphs judge calibration prompts again."""
    model, out = tiny_model("llava", num_hidden_layers=3), tmp_path / "out"
    words = [
        *("--model", str(model), "--out", str(out), "--calibration", str(calibration), "--format", "onnx"),
        *("--safety-layer", "0", "--semantic-layer", "1", "--max-false-positive-rate", "0.1", "--refusal", REFUSAL),
        *("--opset", "20"),
    ]
    monkeypatch.setattr(compare, "JUDGED_AGAIN", 20)
    result = succeeds(*words)
    assert [path.name for path in out.glob("*.safetensors")] == ["sasa-probe.safetensors"]
    assert "Opset 20, float32" in (out / "README.md").read_text()
    line = re.search(
        r"✓ verdicts hold over the calibration prompts: (0\.0% changed of 20 drawn from 48 .*)", result.stderr
    )
    assert line and line[1] in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("form", "error", "said"),
    [
        (
            "onnx", RuntimeError("\nno lowering for aten.odd\nand a page about it"),
            "Error: the graphs could not be made (no lowering for aten.odd). The model may hold",
        ),
        ("both", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "Error: the disk is full: "),
        ("both", KeyboardInterrupt(), "Aborted!"),
    ],
    ids=["an exporter", "a disk that fills up", "Ctrl-C"],
)  # fmt: skip
def test_what_fails_while_graphs_are_written(
    form: str, error: BaseException, said: str, words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left behind. torch's errors have many lines, and a traceback would tell a user nothing."""

    def fail(graph: Any, path: Path, **settings: Any) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(plain, "write_model", fail)
    result = invoke(*words(tmp_path / "out", format=form))
    assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith(said)
    assert not list(tmp_path.iterdir())
