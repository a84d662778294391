"""Verify: reload what was written, in a fresh process, and compare it with what it should be."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sasa_export.models import read_config
from sasa_export.verify.cases import TOKENS, read_cases
from sasa_export.verify.check import Check, cut_short
from sasa_export.verify.files import check_files, check_manifest
from sasa_export.verify.onnx import check_graphs, check_onnx, check_onnx_against, dtype_of
from sasa_export.verify.process import run_fresh

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}  # of P(unsafe), between two processes
BATCHED = {"float32": 1e-4, "bfloat16": 0.15, "float16": 2e-2}  # the same, between a prompt alone and one in a batch
FORMATS = ("safetensors", "onnx")  # the two directories of --format both

__all__ = [
    "Check", "check_files", "check_graphs", "check_manifest", "check_model", "check_onnx", "check_onnx_against",
    "verify_directory",
]  # fmt: skip


def verify_directory(directory: Path | str, *, device: str = "cpu", only_files: bool = False) -> list[Check]:
    """Check a patched directory: its files, and, unless `only_files`, the model in a fresh process.

    An ONNX directory is told by its graphs, and what `--format both` wrote is checked one directory after the other.

    Raises SasaExportError where there is nothing to check, or the model does not even load.
    """
    directory = Path(directory)
    both = [directory / name for name in FORMATS]
    if not (directory / "config.json").exists() and all((path / "config.json").exists() for path in both):
        return [check for path in both for check in verify_directory(path, device=device, only_files=only_files)]
    if dtype_of(directory) is not None:
        checks = [check_manifest(directory)]
        if not checks[0].passed:
            return checks
        return [*checks, *(check_graphs(directory) if only_files else check_onnx(directory, device=device))]
    checks = [*check_files(directory), check_manifest(directory)]
    if only_files or not all(check.passed for check in checks):
        return checks  # loading runs the directory's code, which must not be trusted once a file is wrong
    return [*checks, *check_model(directory, device=device)]


def check_model(directory: Path, *, device: str = "cpu") -> list[Check]:
    """Load the directory in a fresh process and check verdicts, refusals and answers against its cases."""
    written = read_cases(directory)
    if not written:
        return [Check("there are cases to verify", False, "the directory was written without any (--verify files)")]
    dtype, cases = written["dtype"], written["cases"]
    found = run_fresh("fresh.py", directory, dtype, device, str(TOKENS), failure="the patched model does not load")
    sasa = read_config(directory)["sasa"]
    threshold, refusal = sasa["threshold"], sasa["refusal_token_ids"]
    expected = [(case["unsafe_probability"], case["tokens"]) for case in cases]
    got = [(case["unsafe_probability"], case["tokens"]) for case in found["cases"]]

    checks = [
        Check(f"loading {name} fails", outcome != "loaded", outcome) for name, outcome in found["bypasses"].items()
    ]
    checks.append(
        Check(
            "it loads with plain from_pretrained",
            found["model_class"].startswith("Sasa") and found["probe_dtype"] == "torch.float32",
            f"{found['model_class']}, probe in {found['probe_dtype'].removeprefix('torch.')}",
        )
    )
    # Not the built-in max, which can lose a NaN.
    largest = np.max([abs(want - have) for (want, _), (have, _) in zip(expected, got, strict=True)])
    tolerance = TOLERANCE[dtype]
    checks.append(
        Check(
            "P(unsafe) is the original's",
            bool(largest <= tolerance),
            f"largest difference {largest:.1e} over {len(cases)} prompts, tolerance {tolerance:.0e}",
        )
    )
    fitted = [case.get("calibrated") for case in cases]
    apart = [abs(want - have) for want, (have, _) in zip(fitted, got, strict=True) if want is not None]
    if apart:
        largest, tolerance = np.max(apart), BATCHED[dtype]
        detail = f"largest difference {largest:.1e} over {len(apart)} prompts, which ran in batches there"
        checks.append(
            Check(
                "P(unsafe) is that of the calibration", bool(largest <= tolerance), f"{detail}, tolerance {tolerance:g}"
            )
        )
    same = sum(
        (want >= threshold) == (have >= threshold) or abs(want - threshold) <= TOLERANCE[dtype]
        for (want, _), (have, _) in zip(expected, got, strict=True)
    )
    checks.append(Check("verdicts are the original's", same == len(cases), f"{same} of {len(cases)}"))
    refused = [tokens for score, tokens in got if not score < threshold]
    spelled = sum(tokens[: len(refusal)] == refusal[:TOKENS] for tokens in refused)
    detail = f"{spelled} of {len(refused)}" if refused else "no case is refused at this threshold"
    checks.append(Check("refused prompts spell the refusal", spelled == len(refused), detail))
    allowed = [(want, have) for (_, want), (score, have) in zip(expected, got, strict=True) if score < threshold]
    equal = sum(want == have for want, have in allowed)
    cut = 0
    if sasa.get("gate", "prompt") == "every-token":
        cut = sum(want != have and cut_short(want, have, refusal) for want, have in allowed)
        equal += cut
    detail = f"{equal} of {len(allowed)}, token for token over {TOKENS} greedy tokens"
    detail += f", {cut} of them until the refusal took over" if cut else ""
    checks.append(
        Check(
            "allowed prompts are answered as by the original",
            equal == len(allowed),
            detail if allowed else "no case is allowed at this threshold",
        )
    )
    return checks
