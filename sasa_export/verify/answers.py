"""Run a written directory in a process that shares nothing with this one but the installed packages, and compare."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sasa_export.errors import VerifyError
from sasa_export.models import read_config
from sasa_export.models.quantized import scheme
from sasa_export.probe.calibration import Calibration
from sasa_export.prompts.prompt import Prompt
from sasa_export.report import Check
from sasa_export.verify.compare import check_changed, compare, draw, tolerance
from sasa_export.verify.unloaded import check_files, check_graphs, dtype_of
from sasa_export.writers.cases import FOLDER, TOKENS, read_cases, write_prompts
from sasa_export.writers.onnx import SUFFIX

FRESH = Path(__file__).with_name("fresh")
LOADS = json.loads(Path(__file__).with_name("loads.json").read_text(encoding="utf-8"))  # name -> from_pretrained(...)

NOT_COMPARED = Check(
    "answers are the original's",
    False,
    f"not checked, since there are no cases in {FOLDER}/: keep those that sasa-export wrote, or patch the model again",
)


def check_written(
    directory: Path,
    *,
    device: str = "cpu",
    only_files: bool = False,
    calibration: Calibration | None = None,
    load: str | None = None,
) -> list[Check]:
    """All checks but that of the manifest: its files, then verdicts, refusals and answers beside the original's, and
    how many verdicts of a calibration changed.

    Args:
        directory: what was written, with its cases.
        device: torch's name of one. Where onnxruntime cannot use it, the CPU runs, and the checks say so.
        only_files: make no more checks than need no model in memory.
        calibration: prompts of which some are judged again, if any.
        load: the name in loads.json of a quantization with which it is loaded.

    Raises VerifyError where the directory does not run at all.
    """
    graphs = dtype_of(directory)  # None where it holds safetensors
    checks = check_files(directory) if graphs is None else [check_graphs(directory, graphs)]
    if only_files or not all(check.passed for check in checks):
        return checks
    written, config = read_cases(directory), read_config(directory)
    sasa, quantized = config["sasa"], scheme(config) is not None
    if not written and graphs is not None:
        return [*checks, NOT_COMPARED]
    prompts, before = ([], []) if calibration is None else draw(calibration)
    precision = written.get("dtype") or config.get("dtype") or "float32"
    found = run_fresh(directory, graphs, precision, device, prompts, load)
    checks += _loading(found["about"])
    if not written:
        return [*checks, NOT_COMPARED]
    sasa["refusal_token_ids"] = found["about"].get("refusal_token_ids", sasa["refusal_token_ids"])
    dtype = graphs or load or written["dtype"]
    checks += compare(written, found, sasa, dtype, graphs=graphs is not None, quantized=quantized and graphs is None)
    if calibration is not None:
        apart = tolerance(dtype, written["dtype"], graphs=graphs is not None)
        exact = dtype == written["dtype"] == "float32"
        whole = len(calibration.prompts)
        checks.append(check_changed(before, found["judged"], sasa["threshold"], apart, whole, exact=exact))
    return checks


def _loading(about: dict[str, Any]) -> list[Check]:
    """What torch says of the directory's class and of ways around it; nothing where there are only graphs."""
    if "model_class" not in about:
        return []
    guarded = about["model_class"].startswith("Sasa") and about["probe_dtype"] == "float32"
    detail = (
        f"{about['model_class']}, probe in {about['probe_dtype']}, gate proved on transformers {about['transformers']}"
    )
    return [
        *(Check(f"loading {name} fails", said != "loaded", said) for name, said in about["bypasses"].items()),
        Check("it loads with plain from_pretrained", guarded, detail),
    ]


def run_fresh(
    directory: Path, graphs: str | None, dtype: str, device: str, prompts: Sequence[Prompt], load: str | None = None
) -> dict[str, Any]:
    """The JSON object that the program in `fresh/` prints for the directory's cases, and for `prompts` to judge.

    Raises VerifyError where it does not get to its end.
    """
    options = {"dtype": dtype, **(LOADS[load] if load else {})}
    engine = ["torch_model", str(directory.absolute()), json.dumps(options), device]
    if graphs is not None:
        provider = "cuda" if device.startswith("cuda") else "cpu"
        engine = ["onnx_model", str(directory.absolute()), SUFFIX[graphs], provider]
    with tempfile.TemporaryDirectory() as scratch:
        entries = write_prompts(prompts, Path(scratch))
        Path(scratch, "prompts.json").write_text(json.dumps(entries), encoding="utf-8")
        packages = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)  # wherever this process has them
        environment = {
            **os.environ, "PYTHONPATH": packages, "HF_MODULES_CACHE": scratch, "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        command = [sys.executable, str(FRESH), *engine, str(TOKENS), scratch]
        result = subprocess.run(command, capture_output=True, text=True, cwd=scratch, env=environment, check=False)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["no message"]
        what = "the patched model does not load" if graphs is None else "the graphs do not run"
        raise VerifyError(f"{what} in a fresh process ({lines[-1].strip()[:400]}).")
    return dict(json.loads(result.stdout.strip().splitlines()[-1]))
