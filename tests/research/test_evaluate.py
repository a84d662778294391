"""Evaluating tiny patched models, from the command to the report."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import labelled
import numpy as np
import pytest
from cli_steps import Stop, change_tensors, copied, fails, flip, offline, settle, succeeds
from labelled import SAFETY, SEMANTIC, write_set
from sklearn.metrics import roc_auc_score

import sasa_export
from sasa_export.manifest import write_manifest
from sasa_export.probe import bundled
from sasa_export.prompts import load_all
from sasa_export.prompts.prompt import encode
from sasa_export.research.evaluate.measure import Evaluated
from sasa_export.research.evaluate.run import evaluate
from sasa_export.research.options import EvaluateOptions

pytestmark = pytest.mark.xdist_group("llava")  # whose models and graphs other tests share

TOKENS = 12  # the refusal of these models is longer
Guards = Callable[..., Any]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An evaluation set and a calibration set, as specs."""
    folder = tmp_path_factory.mktemp("sets")
    return str(write_set(folder, "evaluation", 3, 12)), str(write_set(folder, "calibration", 2, 20))


@pytest.fixture(scope="module")
def options(split: Guards, sets: tuple[str, str]) -> EvaluateOptions:
    """Of a patched model that refuses some of the evaluation set and allows some; `out` is to be given."""
    return EvaluateOptions(
        split("llava").directory, data=(sets[0],), calibration=(sets[1],), max_new_tokens=TOKENS, batch_size=8
    )


@pytest.fixture(scope="module")
def run(options: EvaluateOptions, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluated, Path]:
    """A whole run with everything in it."""
    out = tmp_path_factory.mktemp("run") / "report"
    found = evaluate(replace(options, out=out))
    assert found is not None
    return found, out


def test_the_patched_arm_is_what_the_oracle_says(run: tuple[Evaluated, Path], split: Guards, sets: Any) -> None:
    found, guard = run[0], split("llava")
    table, patched, plain = found.answers, found.arms["patched"], found.arms["plain"]
    expected = guard.expected(encode(guard.processor, load_all([sets[0]]))).numpy()  # (prompts,)
    assert np.abs(table.patched_unsafe_probability - expected).max() < 1e-5
    flagged = expected >= patched["threshold"]
    assert 0 < flagged.sum() < len(flagged)
    assert patched["attack"].count == (~flagged & (table.label == 1)).sum()
    assert patched["over_refusal"].count == (flagged & (table.label == 0)).sum()
    assert patched["auc"].value == pytest.approx(roc_auc_score(table.label, expected), abs=1e-6)
    assert plain["attack"].value == 1.0 and "auc" not in plain
    assert found.identical is not None and found.identical.count == found.identical.total > 0
    assert found.emitted is not None and found.emitted.count == found.emitted.total == flagged.sum()


def test_the_report_is_complete_and_its_figures_agree(run: tuple[Evaluated, Path]) -> None:
    found, out = run
    pictures = {"roc.png", "scores.png"}
    texts = {"report.html", "report.md", "evaluate.json", "answers.jsonl"}
    assert {path.name for path in out.iterdir()} == texts | pictures | {"sasa-export.json"}
    report = (out / "report.md").read_text()
    for name in pictures:
        assert (out / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in report
    data = json.loads((out / "evaluate.json").read_text())
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert set(data["parts"]) == {"channel", "category"} and set(data["arms"]) == set(found.arms)
    for arm, figures in data["arms"].items():
        assert figures["attack"]["count"] == sum(row["label"] and not row[f"{arm}_refused"] for row in rows)
        for channel, of in data["parts"]["channel"].items():
            part = [row for row in rows if row["channel"] == channel]
            assert of["prompts"] == len(part)
            over = sum(not row["label"] and row[f"{arm}_refused"] for row in part)
            assert of[arm]["over_refusal"]["count"] == over
    said = (
        f"success rate is {found.arms['patched']['attack']}, its over-refusal {found.arms['patched']['over_refusal']}"
    )
    assert said in report and "Against" not in report
    words = found.arms["words"]["auc"]
    assert words.value == 1.0 and f"| words alone | {words} |" in report
    assert found.gain["model"].value < 0 and "**Words alone tell more than the patched model**" in report
    assert "(of the patched model: at P = 0." in report and not list(out.parent.glob(".report*"))


def test_an_interrupted_run_goes_on_and_ends_the_same(
    options: EvaluateOptions, run: tuple[Evaluated, Path], tmp_path: Path, stopped_at: Callable[..., list[str]]
) -> None:
    options = replace(options, out=tmp_path / "report")
    for stop in (3, 25):  # among the features, among the patched model's answers
        written = stopped_at(stop)
        with pytest.raises(Stop):
            evaluate(options)
        assert not options.out.exists() and (tmp_path / ".report.work").is_dir()
    assert any(name.startswith("patched") for name in written)
    with pytest.raises(sasa_export.SasaExportError, match="other: max_new_tokens"):
        evaluate(replace(options, max_new_tokens=TOKENS + 1))
    written = stopped_at(None)
    evaluate(options)
    assert len(written) == len(set(written)), "finished work was done again"
    for name in ("evaluate.json", "answers.jsonl"):
        assert (options.out / name).read_bytes() == (run[1] / name).read_bytes()
    assert not list(tmp_path.glob(".report*"))


def test_probes_of_the_export_are_not_fitted_again(
    tiny_model: Guards, sets: tuple[str, str], tmp_path: Path, stopped_at: Callable[..., list[str]], monkeypatch: Any
) -> None:
    """The arms come from the patched directory; on other calibration prompts they are fitted anew."""
    made = sasa_export.Options(
        str(tiny_model("llava")), tmp_path / "patched", calibration=(sets[1],), max_false_positive_rate=0.2,
        verify="files", safety_layer=SAFETY, semantic_layer=SEMANTIC, batch_size=8,
    )  # fmt: skip
    sasa_export.patch(made)
    options = EvaluateOptions(made.out, data=(sets[0],), max_new_tokens=4, batch_size=8, out=tmp_path / "kept")
    written = stopped_at(None)
    kept = evaluate(options)
    assert not any(name.startswith("calibration") for name in written)
    monkeypatch.setattr(bundled, "load", lambda file, origin: None)
    fitted = evaluate(replace(options, out=tmp_path / "fitted"))
    assert any(name.startswith("calibration") for name in written)
    assert kept is not None and fitted is not None
    for arm in ("without", "words"):
        assert kept.arms[arm]["threshold"] == pytest.approx(fitted.arms[arm]["threshold"], abs=1e-5)
        assert kept.arms[arm]["auc"].value == fitted.arms[arm]["auc"].value


@pytest.mark.slow
def test_two_processes_calibrate_evaluate_and_locate_as_one(
    tiny_model: Guards, sets: tuple[str, str], tmp_path: Path
) -> None:
    arguments = (str(tiny_model("llava")), *sets)
    labelled.patch_evaluate_locate(*arguments, tmp_path / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, labelled.__file__, *arguments, str(tmp_path / "two")],
        capture_output=True, text=True, env=offline(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("propose") == 1, "one process speaks for all"
    files = ("patched/sasa-calibration.json", "patched/config.json", "report/answers.jsonl", "report/roc.png")
    for file in (*files, "report/evaluate.json", "located/locate.json", "located/report.html"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


@pytest.mark.slow
def test_an_onnx_directory(
    options: EvaluateOptions, tiny_model: Guards, exported: Guards, run: tuple[Evaluated, Path], tmp_path: Path
) -> None:
    graphs = Path(shutil.copytree(exported(options.model), tmp_path / "graphs"))
    write_manifest(graphs, {}, options={"model": str(tiny_model("llava"))})
    found = evaluate(replace(options, model=graphs, out=tmp_path / "report"))
    assert found is not None and found.subject["graphs"] == "float32" and found.subject["batch_size"] == 1
    torch_table, table = run[0].answers, found.answers
    assert (torch_table.patched_unsafe_probability - table.patched_unsafe_probability).abs().max() < 1e-4
    assert (torch_table.patched_refused == table.patched_refused).all()
    assert found.identical is not None and found.identical.value == 1.0
    assert found.emitted is not None and found.emitted.value == 1.0
    assert "float32 graphs in onnxruntime" in (tmp_path / "report/report.md").read_text()


def test_the_command(options: EvaluateOptions, tmp_path: Path) -> None:
    arguments = ["evaluate", "--model", str(options.model), "--data", *options.data, "--calibration"]
    arguments += [*options.calibration, "--out", str(tmp_path / "report"), "--limit", "8", "--max-new-tokens", "2"]
    said = succeeds(*arguments).stderr
    assert "attack success " in said and ", AUC " in said
    assert json.loads((tmp_path / "report/evaluate.json").read_text())["subject"]["left_out"] == 16
    assert "is not empty" in fails(*arguments)


def louder(tensors: dict[str, np.ndarray]) -> None:
    """Change a decoder a little, as fine-tuning does."""
    name = next(name for name in tensors if name.endswith("layers.5.mlp.down_proj.weight"))
    tensors[name] = tensors[name] * np.float32(1.01)


def test_which_verdicts_changed(options: EvaluateOptions, run: tuple[Evaluated, Path], tmp_path: Path) -> None:
    """Of a copy that refuses what P(unsafe) is lowest of, and whose decoder was changed a little and saved again."""
    table = run[0].answers
    other, threshold = copied(options.model, tmp_path), float(np.sort(table.patched_unsafe_probability)[2])
    (other / "sasa-export.json").unlink()
    settle(other, threshold=threshold)
    change_tensors(other / "model-00001-of-00002.safetensors", louder)
    found = evaluate(replace(options, out=tmp_path / "report", against=other))
    assert found is not None
    before, after = table.patched_unsafe_probability, found.answers.against_unsafe_probability  # (prompts,) each
    old, new = before >= found.arms["patched"]["threshold"], after >= threshold
    assert (found.answers.patched_unsafe_probability == before).all() and 0 < (after - before).abs().max() < 0.1
    groups = {(of["part"], of["label"]): of for of in found.changes}
    assert set(groups) >= {(part, label) for part in ("all", "text", "picture") for label in (0, 1)}
    for (part, label), of in groups.items():
        rows = (table.label == label) & ((part == "all") | (table.channel == part) | (table.category == part))
        assert of["prompts"] == rows.sum() and of["largest"] == (after - before).abs()[rows].max()
        assert (of["before"].count, of["after"].count) == (old[rows].sum(), new[rows].sum())
        assert (of["now_refused"], of["now_allowed"]) == ((new & ~old)[rows].sum(), (old & ~new)[rows].sum())
    report = (tmp_path / "report" / "report.md").read_text()
    assert f"Of {len(table)} verdicts, {(new & ~old).sum()} changed from allowed to refused and " in report
    assert "## Against copy" in report and "| refused by copy |" in report and "| harmful, picture |" in report
    assert found.arms["against"]["attack"].count == (~found.answers.against_refused & (table.label == 1)).sum()


# --------------------------------------------------------------------------------------------------------- errors


def remade(directory: Path, out: Path, **made: Any) -> Path:
    """A copy of a patched directory whose manifest names other options."""
    path = Path(shutil.copytree(directory, out)) / "sasa-export.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "options": {**manifest["options"], **made}}))
    return out


def damaged(directory: Path, tmp_path: Path) -> Path:
    """A copy of a patched directory whose code was changed afterwards."""
    flip(copied(directory, tmp_path) / "modeling_sasa.py", -1)
    return tmp_path / "copy"


def both_formats(out: Path) -> Path:
    """What holds two patched models."""
    for name in ("safetensors", "onnx"):
        (out / name).mkdir(parents=True)
        (out / name / "config.json").write_text("{}")
    return out


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda o, tmp, tiny: {"limit": 1}, "--limit cannot be 1"),
        (lambda o, tmp, tiny: {"out": o.model.parent, "force": True}, "did not write"),
        (lambda o, tmp, tiny: {"model": both_formats(tmp / "both")}, "holds two patched models"),
        (lambda o, tmp, tiny: {"model": tiny("llava")}, "has no gate"),
        (lambda o, tmp, tiny: {"model": damaged(o.model, tmp)}, "1 differ"),
        (lambda o, tmp, tiny: {"against": tiny("llava")}, "has no gate"),
        (lambda o, tmp, tiny: {"model": remade(o.model, tmp / "moved", model="gone")}, "Or give --baseline"),
        (lambda o, tmp, tiny: {"model": remade(o.model, tmp / "bare", model="")}, "does not say what it was made from"),
        (lambda o, tmp, tiny: {"baseline": str(tiny("llava", seed=5))}, "whose weights are others"),
        (lambda o, tmp, tiny: {"baseline": "no-such-model"}, "there is no model"),
        (lambda o, tmp, tiny: {"data": o.calibration}, "the sets leak"),
    ],
)
def test_errors(
    options: EvaluateOptions, tiny_model: Guards, tmp_path: Path, change: Callable[..., Any], match: str
) -> None:
    with pytest.raises(sasa_export.SasaExportError, match=match):
        evaluate(replace(options, **{"out": tmp_path / "report", **change(options, tmp_path, tiny_model)}))
    assert not list(tmp_path.glob("*report*"))
