"""Runs a written directory in a process that shares only the installed packages with this one, and compares answers."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sasa_export.errors import VerifyError
from sasa_export.gate import GateSpec
from sasa_export.models import read_config
from sasa_export.models.contents import read_object
from sasa_export.models.quantized import scheme
from sasa_export.onnx import graphs_of
from sasa_export.probe.calibration import Calibration
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Check
from sasa_export.verify.compare import check_changed, compare, draw, tolerance
from sasa_export.verify.unloaded import check_files, check_graphs
from sasa_export.writers.cases import CASES, FOLDER, TOKENS, write_prompts

FRESH = Path(__file__).with_name("fresh")
LOADS = json.loads(Path(__file__).with_name("loads.json").read_text(encoding="utf-8"))  # name -> keywords

NOT_COMPARED = Check(
    "answers are the original's",
    False,
    f"not checked, since there are no cases in {FOLDER}/: keep those that sasa-export wrote, or patch the model again",
)


def check_written(
    directory: Path, *, device: str = "cpu", only_files: bool = False, calibration: Calibration | None = None,
    load: str | None = None,
) -> list[Check]:  # fmt: skip
    """Return all checks except the manifest's: files, then verdicts, refusals and answers against the original's, and
    the number of changed verdicts of a calibration.

    Args:
        directory: the written directory, with its cases.
        device: a device in torch's notation. If onnxruntime cannot use it, the CPU runs, and the checks say so.
        only_files: make only the checks that need no model in memory.
        calibration: the calibration of which some prompts are judged again, if any.
        load: the name of a quantization in loads.json with which the model is loaded.

    Raises VerifyError where the directory does not run at all.
    """
    told = graphs_of(directory)  # empty where it holds safetensors
    graphs, checks = bool(told), check_graphs(directory) if told else check_files(directory)
    if only_files or not all(check.passed for check in checks):
        return checks
    written, config = read_object(directory / FOLDER / CASES), read_config(directory)
    gate, quantized = GateSpec.from_json(config["sasa"]), scheme(config) is not None
    if not written and graphs:
        return [*checks, NOT_COMPARED]
    prompts, before = ([], []) if calibration is None else draw(calibration)
    precision = written.get("dtype") or config.get("dtype") or "float32"
    options = {"dtype": precision, **LOADS.get(load, {})}
    found = run_fresh(directory, "onnx_model" if graphs else "torch_model", options, device, prompts)
    checks += _loading(found["about"])
    if not written:
        return [*checks, NOT_COMPARED]
    gate = replace(gate, refusal_token_ids=found["about"].get("refusal_token_ids", gate.refusal_token_ids))
    dtype = told.get("dtype") or load or written["dtype"]
    checks += compare(written, found, gate, dtype, graphs=graphs, quantized=quantized and not graphs)
    if "model_file" in config and load is None and importlib.util.find_spec("mlx_vlm") is not None:
        there = run_fresh(directory, "mlx_model", {}, device, [])
        also = compare(written, there, gate, config.get("dtype") or precision, graphs=True, quantized=quantized)
        checks += [replace(it, name=f"in mlx-vlm, {it.name}") for it in also if "calibration" not in it.name]
    if calibration is not None:
        apart, whole = tolerance(dtype, written["dtype"], graphs=graphs), len(calibration.prompts)
        alike = all(case["calibrated"] is not None for case in written["cases"])  # not for a shipped probe's scores
        exact = dtype == written["dtype"] == "float32" and alike
        checks.append(check_changed(before, found["judged"], gate.threshold, apart, whole, exact=exact))
    return checks


def _loading(about: dict[str, Any]) -> list[Check]:
    """Return the checks of the loaded class and of ways to load without the gate. Graphs have none."""
    if "model_class" not in about:
        return []
    guarded = about["model_class"].startswith("Sasa") and about["probe_dtype"] == "float32"
    detail = "{model_class}, probe in {probe_dtype}, gate proved on transformers {transformers}".format(**about)
    return [
        *(Check(f"loading {name} fails", said != "loaded", said) for name, said in about["bypasses"].items()),
        Check("it loads with plain from_pretrained", guarded, detail),
    ]


def run_fresh(
    directory: Path, engine: str, options: Mapping[str, Any], device: str, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Return the JSON object that the program in `fresh/` prints for the directory's cases and for `prompts`, which are
    only judged. `engine` is the file there that loads the directory with the `options`.

    Raises VerifyError where the program fails.
    """
    arguments = [engine, str(directory.absolute()), json.dumps(options), device]
    with tempfile.TemporaryDirectory() as scratch:
        entries = write_prompts(prompts, Path(scratch))
        Path(scratch, "prompts.json").write_text(json.dumps(entries), encoding="utf-8")
        packages = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)  # this process's own
        environment = {
            **os.environ, "PYTHONPATH": packages, "HF_MODULES_CACHE": scratch, "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        command = [sys.executable, str(FRESH), *arguments, str(TOKENS), scratch]
        result = subprocess.run(command, capture_output=True, text=True, cwd=scratch, env=environment, check=False)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["no message"]
        what = "the graphs do not run" if engine == "onnx_model" else "the patched model does not load"
        raise VerifyError(f"{what} in a fresh process ({lines[-1].strip()[:400]}).")
    return dict(json.loads(result.stdout.strip().splitlines()[-1]))
