"""Checks of an ONNX directory: its graphs as files, and what they say in plain onnxruntime, in a fresh process."""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sasa_export.errors import VerifyError
from sasa_export.graph import blocks_again
from sasa_export.models import read_config
from sasa_export.verify.cases import TOKENS, read_cases
from sasa_export.verify.check import Check, cut_short
from sasa_export.verify.flips import Flips, Reference, check_flips, count_flips, write_prompts
from sasa_export.verify.process import run_fresh
from sasa_export.writers.onnx import DECODER, GRAPHS, SUFFIX

# Of P(unsafe) and of the logits (relative to the largest), by type: of the graphs or of the cases, whichever is
# wider. The logits of quantized weights are not held to the original's.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 0.15, "int8": 0.15, "int4": 0.15}
LOGITS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 0.15}
CHUNK = 2**24  # bytes of a weight that are in memory at a time
SINGLE = ("Attention", "RMSNormalization", "RotaryEmbedding")


def dtype_of(directory: Path) -> str | None:
    """The type of a directory's graphs, by their names; None where it is no ONNX directory."""
    return next((t for t, suffix in SUFFIX.items() if (directory / "onnx" / f"{DECODER}{suffix}.onnx").is_file()), None)


def runs_here(dtype: str) -> bool:
    """Can this machine's onnxruntime execute graphs of a type? Its CPU provider has no bfloat16."""
    import onnxruntime

    return dtype != "bfloat16" or "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def check_onnx(directory: Path, *, device: str = "cpu") -> list[Check]:
    """All checks of an ONNX directory. Raises VerifyError where its graphs do not run at all."""
    return check_onnx_against(directory, None, device=device)[0]


def check_onnx_against(
    directory: Path, wanted: Reference | None, *, device: str = "cpu"
) -> tuple[list[Check], Flips | None]:
    """All checks, and how many verdicts of calibration prompts flip, where there are such prompts.

    Raises VerifyError where the graphs do not run at all.
    """
    checks = check_graphs(directory)
    if not all(check.passed for check in checks):
        return checks, None
    answers, flips = _check_answers(directory, wanted, device)
    return [*checks, *answers], flips


def check_graphs(directory: Path) -> list[Check]:
    """What needs no run: the graph checker, weights stored twice, the cache's layers, single operators."""
    import onnx_ir

    suffix = SUFFIX[_dtype(directory)]
    missing = [name for name in GRAPHS if not (directory / "onnx" / f"{name}{suffix}.onnx").is_file()]
    if missing:
        return [Check("the three graphs are there", False, f"{', '.join(missing)} missing")]
    paths = [directory / "onnx" / f"{name}{suffix}.onnx" for name in GRAPHS]
    valid = _valid(paths)
    if not valid.passed:
        return [valid]
    models = [onnx_ir.load(path) for path in paths]
    return [valid, _stored_once(models), *_decoder(models[GRAPHS.index(DECODER)], read_config(directory))]


def _valid(paths: list[Path]) -> Check:
    import onnx

    name = "the graph checker passes"
    for path in paths:
        try:
            onnx.checker.check_model(path, full_check=True)
        except Exception as error:  # it raises errors of its own, of protobuf and of the file system
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            return Check(name, False, f"{path.name}: {type(error).__name__}: {said[:200]}")
    return Check(name, True, f"{len(paths)} of {len(paths)} graphs")


def _stored_once(models: list[Any]) -> Check:
    stored = unique = 0
    for model in models:
        seen: set[tuple[str, tuple[int, ...], bytes]] = set()
        for tensor in _tensors(model):
            key = (str(tensor.dtype), tuple(tensor.shape.numpy()), _digest(tensor))
            stored += tensor.nbytes
            unique += 0 if key in seen else tensor.nbytes
            seen.add(key)
    # Indices of a few bytes may repeat: they are constants of the graph, not weights.
    detail = f"{stored:,} bytes, {unique:,} of them unique"
    return Check("no weight is stored twice", stored - unique < 1024, detail)


def _digest(tensor: Any) -> bytes:
    """SHA-256 of a tensor's bytes. What is read of a file beside the graph leaves memory again."""
    import onnx_ir

    if not isinstance(tensor, onnx_ir.ExternalTensor):
        return hashlib.sha256(tensor.tobytes()).digest()
    digest, left = hashlib.sha256(), tensor.nbytes
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset or 0)
        while left and (chunk := file.read(min(left, CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.digest()


def _tensors(model: Any) -> Iterator[Any]:
    """All that a model stores, in subgraphs and Constant nodes too."""
    for graph in model.graphs():
        yield from (value.const_value for value in graph.initializers.values() if value.const_value is not None)
        for node in graph:
            if node.op_type == "Constant" and "value" in node.attributes:
                yield node.attributes["value"].value


def _decoder(model: Any, config: dict[str, Any]) -> list[Check]:
    """The cache's layers, and at opset 23 the operators that must not be taken apart."""
    layers = sum(value.name.startswith("past_key_values.") for value in model.graph.inputs) // 2
    counted = config["text_config"]["num_hidden_layers"]
    checks = [
        Check(
            "config.json counts the gate's layers in the cache",
            layers == counted,
            f"{counted} in it, {layers} in the graph",
        )
    ]
    opset = model.graph.opset_imports[""]
    if opset < 23:
        return checks
    main = sum(node["op"] == "block" for node in config["sasa"]["graph"])
    again = _blocks_again(config["sasa"])
    blocks = main + again
    counts = Counter(node.op_type for node in model.graph.all_nodes())
    whole = counts["Attention"] == blocks and counts["RMSNormalization"] >= 2 * blocks
    said = ", ".join(f"{counts[operator]} {operator}" for operator in SINGLE)
    # Rotary embedding with three axes, or in half precision, is several operators in every export so far.
    detail = f"{said} over {main} + {again} blocks, opset {opset}"
    return [*checks, Check("attention and norms are single operators", whole, detail)]


def _blocks_again(sasa: dict[str, Any]) -> int:
    """How many blocks the graph has for the second lane alone."""
    again = blocks_again(sasa["graph"])
    if sasa.get("gate", "prompt") == "every-token":  # from f+1 on both lanes are one batch
        again = [index for index in again if index <= sasa["semantic_layer"]]
    return len(again)


def _check_answers(directory: Path, wanted: Reference | None, device: str) -> tuple[list[Check], Flips | None]:
    """Run the directory's cases, compare P(unsafe), verdicts, refusals and answers, and judge the wanted prompts.

    `device` is torch's name of one; where onnxruntime cannot use it, the CPU provider runs, and the check says so.
    """
    dtype, written = _dtype(directory), read_cases(directory)
    if not written:
        detail = "the directory was written without any (--verify files)"
        return [Check("there are cases to verify", False, detail)], None
    if not runs_here(dtype):
        return [Check("the graphs run", False, f"{dtype} needs the CUDA provider, and onnxruntime has none here")], None
    on_gpu = dtype == "bfloat16" or device.startswith("cuda")
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [SUFFIX[dtype], "cuda" if on_gpu else "cpu", str(TOKENS)]
        if wanted is not None:
            write_prompts(wanted, Path(scratch))
            arguments.append(scratch)
        found = run_fresh("onnx_fresh.py", directory, *arguments, failure="the graphs do not run")
    sasa = read_config(directory)["sasa"]
    checks = compare(written, found, sasa, dtype)
    if wanted is None:
        return checks, None
    flips = count_flips(wanted, found["judged"], sasa["threshold"], dtype)
    tolerance = max(TOLERANCE[dtype], TOLERANCE[wanted.dtype])
    return [*checks, check_flips(flips, wanted, found["judged"], sasa["threshold"], tolerance)], flips


def compare(written: dict[str, Any], found: dict[str, Any], sasa: dict[str, Any], dtype: str) -> list[Check]:
    """Checks of what was found against the cases that were written; `dtype` is that of the graphs."""
    cases, got = written["cases"], found["cases"]
    pairs = list(zip(cases, got, strict=True))
    exact = dtype == "float32" and written["dtype"] == "float32"
    threshold, refusal = sasa["threshold"], sasa["refusal_token_ids"]
    tolerance = max(TOLERANCE[dtype], TOLERANCE[written["dtype"]])
    # Not the built-in max, which can lose a NaN.
    largest = np.max([abs(case["unsafe_probability"] - have["unsafe_probability"]) for case, have in pairs])
    checks = [
        Check(
            "P(unsafe) is the original's",
            bool(largest <= tolerance),
            f"largest difference {largest:.1e} over {len(cases)} prompts, tolerance {tolerance:g} "
            f"({dtype} graphs on {found['provider']}, {written['dtype']} original)",
        )
    ]

    def refuses(entry: dict[str, Any]) -> bool:
        return not entry["unsafe_probability"] < threshold  # NaN is refused

    clear = [pair for pair in pairs if abs(pair[0]["unsafe_probability"] - threshold) > tolerance]
    same = sum(refuses(case) == refuses(have) for case, have in clear)
    flips = sum(refuses(case) != refuses(have) for case, have in pairs)
    detail = f"{same} of {len(clear)} outside the tolerance of the threshold; {flips} of {len(pairs)} flipped"
    checks.append(Check("verdicts are the original's", same == len(clear), detail))

    refused = [have["tokens"] for have in got if refuses(have)]
    spelled = sum(tokens[: len(refusal)] == refusal[:TOKENS] for tokens in refused)
    detail = f"{spelled} of {len(refused)}" if refused else "no case is refused at this threshold"
    checks.append(Check("refused prompts spell the refusal", spelled == len(refused), detail))

    allowed = [(case, have) for case, have in pairs if not refuses(have)]
    answers = _tokens(allowed, exact, refusal, found["changes"], may_be_cut=sasa.get("gate", "prompt") == "every-token")
    return [*checks, _logits(allowed, dtype, written["dtype"]), answers]


def _logits(allowed: list[tuple[Any, Any]], *dtypes: str) -> Check:
    """The first token's largest logits, as the original has them."""
    name = "allowed prompts have the original's logits"
    finite = all(have["finite"] for _, have in allowed)
    wanted = [value for case, _ in allowed for _, value in case.get("logits", ())]
    if not wanted or not finite:
        return Check(name, finite, "none to compare" if finite else "some are NaN or infinite")
    scale = max(1.0, max(abs(value) for value in wanted))
    largest = max(
        abs(value - have) for value, have in zip(wanted, [v for _, h in allowed for v in h["logits"]], strict=True)
    )
    detail = f"largest difference {largest:.1e} over the {len(wanted)} largest of the first token"
    if not all(dtype in LOGITS for dtype in dtypes):
        return Check(name, True, f"{detail}, not held to a tolerance")
    tolerance = scale * max(LOGITS[dtype] for dtype in dtypes)
    return Check(name, largest <= tolerance, f"{detail}, tolerance {tolerance:.1g}")


def _tokens(
    allowed: list[tuple[Any, Any]], exact: bool, refusal: list[int], changes: list[str], *, may_be_cut: bool
) -> Check:
    """The greedy answers: the original's where all is float32, and in no case the refusal in their place.

    With `may_be_cut` an answer may turn into the refusal after its first token.
    """
    name = "allowed prompts are answered as by the original"
    if not allowed:
        return Check(name, True, "no case is allowed at this threshold")
    equal = sum(case["tokens"] == have["tokens"] for case, have in allowed)
    spelled = sum(
        have["tokens"][: len(refusal)] == refusal[:TOKENS] and have["tokens"] != case["tokens"]
        for case, have in allowed
    )
    turned = [(case, have) for case, have in allowed if may_be_cut and case["tokens"] != have["tokens"]]
    cut = sum(cut_short(case["tokens"], have["tokens"], refusal) for case, have in turned)
    equal += cut
    detail = f"{equal} of {len(allowed)}, token for token over {TOKENS} greedy tokens"
    detail += f", {cut} of them until the refusal took over" if cut else ""
    if changes:
        detail += f" (not required: generation_config.json sets {', '.join(changes)}, which this check does not follow)"
    elif not exact:
        detail += " (required only where graphs and calibration are float32)"
    if spelled:
        detail += f"; {spelled} refused in spite of their verdict"
    return Check(name, not spelled and (equal == len(allowed) or not exact or bool(changes)), detail)


def _dtype(directory: Path) -> str:
    dtype = dtype_of(directory)
    if dtype is None:
        raise VerifyError(f"{directory} holds no onnx/{DECODER}.onnx. It is no exported ONNX directory.")
    return dtype
