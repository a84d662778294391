"""Evaluating tiny patched models, from the command to the report."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
from click.testing import CliRunner
from sklearn.metrics import roc_auc_score

import sasa_export
from sasa_export.cli import main
from sasa_export.errors import LocateError
from sasa_export.graph.rewrite import LaneSettings, rewrite_lane
from sasa_export.graph.trace import trace_source
from sasa_export.manifest import write_manifest
from sasa_export.models import open_source
from sasa_export.models.load import SPREAD, load_model, load_processor
from sasa_export.probe.features import RECENT, batches, reading
from sasa_export.prompts import load_all
from sasa_export.prompts.prompt import encode
from sasa_export.report import Console
from sasa_export.research.evaluate import EvaluateError, EvaluateOptions, evaluate
from sasa_export.research.evaluate.depth import depths_of
from sasa_export.research.evaluate.guarded import open_baseline, open_guarded
from sasa_export.research.evaluate.result import Evaluated
from sasa_export.research.evaluate.torch_model import TorchModel
from sasa_export.research.evaluate.variants import LAST_TOKENS
from sasa_export.research.locate import LocateOptions, locate

pytestmark = pytest.mark.xdist_group("llava")  # whose models and graphs other tests share

SAFETY, SEMANTIC = 2, 4
TOKENS = 12  # the refusal of these models is longer than most answers are looked at elsewhere
WORDS = {0: ("cake", "rice", "apples", "river"), 1: ("broken", "fire", "knife", "old")}

Guards = Callable[..., Any]


def write_set(folder: Path, name: str, seed: int, groups: int) -> Path:
    """A data set of pairs, every third with pictures; its labels are easily told by their words."""
    draw = random.Random(seed)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for group in range(groups):
        for label in (0, 1):
            image = None
            if group % 3 == 0:
                image = f"pictures/{name}-{group}-{label}.png"
                tiny.random_image(1000 * seed + 2 * group + label).save(folder / image)
            asked = f"{name} {group} " + " ".join(draw.choices(WORDS[label], k=6))
            entry = {"image": image, "prompt": asked, "label": label, "group": f"pair {group}"}
            lines.append({**entry, "category": ("kitchen", "street")[group % 2], "id": f"{name}-{group}-{label}"})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An evaluation set and a calibration set, as specs."""
    folder = tmp_path_factory.mktemp("sets")
    return str(write_set(folder, "evaluation", 1, 12)), str(write_set(folder, "calibration", 2, 20))


@pytest.fixture(scope="module")
def split_guard(split: Guards) -> Any:
    """A guard that refuses some of the evaluation set and allows some."""
    return split("llava")


def options_of(guard: Any, sets: tuple[str, str], out: Path, **more: Any) -> EvaluateOptions:
    given = {"max_new_tokens": TOKENS, "batch_size": 8, "timing": 0, **more}
    return EvaluateOptions(model=guard.directory, out=out, data=(sets[0],), calibration=(sets[1],), **given)


@pytest.fixture(scope="module")
def run(split_guard: Any, sets: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluated, Path]:
    """A whole run with everything in it."""
    out = tmp_path_factory.mktemp("run") / "report"
    found = evaluate(options_of(split_guard, sets, out, timing=2, depth_curve=True, variants=True))
    assert found is not None
    return found, out


# -------------------------------------------------------------------------------------------------- a whole run


def test_the_patched_arm_is_what_the_oracle_says(run: tuple[Evaluated, Path], split_guard: Any) -> None:
    found, _ = run
    arm = found.arm("patched")
    assert arm.scores is not None and arm.flagged is not None
    expected = split_guard.expected(encode(split_guard.processor, found.prompts)).numpy()
    assert np.abs(arm.scores - expected).max() < 1e-5
    assert 0 < arm.flagged.sum() < len(found.prompts)
    labels = found.labels
    patched = found.overall["patched"]
    assert patched.attack is not None and patched.over_refusal is not None and patched.detection is not None
    assert patched.attack.count == (~arm.flagged & (labels == 1)).sum()
    assert patched.over_refusal.count == (arm.flagged & (labels == 0)).sum()
    assert patched.detection.auc.value == pytest.approx(roc_auc_score(labels, expected), abs=1e-6)
    plain = found.overall["plain"]
    assert plain.attack is not None and plain.attack.value == 1.0 and plain.detection is None


def test_answers_stay_and_refusals_are_spelled(run: tuple[Evaluated, Path]) -> None:
    found, _ = run
    assert found.utility.identical is not None and found.utility.spelled is not None
    assert found.utility.identical.count == found.utility.identical.total > 0
    assert found.utility.spelled.count == found.utility.spelled.total > 0


def test_words_win_where_words_tell_all(run: tuple[Evaluated, Path]) -> None:
    found, _ = run
    words = found.overall["words"].detection
    assert words is not None and words.auc.value == 1.0
    assert found.gain["model"].value < 0
    assert "**Words alone tell more than the patched model**" in (run[1] / "report.md").read_text()


def test_the_report_is_complete_and_its_figures_agree(run: tuple[Evaluated, Path]) -> None:
    found, out = run
    pictures = {"answers.png", "roc.png", "scores.png", "reliability.png", "depth.png"}
    assert {path.name for path in out.iterdir()} == {
        "report.md", "card_section.md", "evaluate.json", "answers.jsonl", *pictures
    }  # fmt: skip
    for name in pictures:
        assert (out / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in (out / "report.md").read_text()
    data = json.loads((out / "evaluate.json").read_text())
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == [prompt.name for prompt in found.prompts]
    for arm in data["arms"]:
        harmful = [row["arms"][arm]["refused"] for row in rows if row["label"]]
        assert data["arms"][arm]["attack"]["count"] == len(harmful) - sum(harmful)
        for channel, figures in data["parts"]["channel"].items():
            part = [row for row in rows if row["channel"] == channel]
            assert figures["prompts"] == len(part)
            assert figures[arm]["over_refusal"]["count"] == sum(
                row["arms"][arm]["refused"] for row in part if not row["label"]
            )
    assert set(data["parts"]) == {"channel", "category"}
    assert data["timing"]["verdict"]["allowed"]["prompts"] == 1
    report = (out / "report.md").read_text()
    assert "(of the patched model: at P = 0." in report and "as given)" in report
    for target in found.targets:
        assert target.sentence() in report and target.sentence() in (out / "card_section.md").read_text()
    assert not list(out.parent.glob(".report*"))


def test_the_depth_curve_ends_where_the_probe_reads(run: tuple[Evaluated, Path]) -> None:
    found, _ = run
    assert [depth.block for depth in found.depth] == [2, 3, 4, 5]
    assert [depth.cost for depth in found.depth] == pytest.approx([1, 7 / 6, 8 / 6, 9 / 6])
    projected, without = found.depth[-1].auc.value, found.overall["without"].detection
    assert without is not None
    assert found.gain["projection"].value == pytest.approx(projected - without.auc.value)


def test_what_is_read_within_the_lane(
    tiny_model: Callable[..., Path], stock: Callable[..., Any], sets: tuple[str, str]
) -> None:
    """Against hooks on the stock model, whose safety block is made to put out the projection."""
    source = open_source(str(tiny_model("llava")))
    lane = rewrite_lane(trace_source(source), LaneSettings(SAFETY, SEMANTIC))
    model, processor = load_model(source, dtype="float32", device="cpu"), load_processor(source)
    prompts = load_all([sets[0]])
    rows = next(batches(prompts, 4))
    depths = depths_of(lane)
    with reading(model, processor, lane, list(depths.values()), recent=LAST_TOKENS) as read:
        found = read(prompts, rows)
    judge, _ = stock("llava")
    inputs = encode(processor, [prompts[row] for row in rows])
    seen = oracle.block_outputs(judge, inputs, (SAFETY, SEMANTIC))
    projection = oracle.project(seen[SAFETY], seen[SEMANTIC])  # (batch, tokens, hidden)
    states = {SAFETY: projection}
    handles = [
        oracle.blocks(judge)[block].register_forward_hook(
            lambda module, args, output, block=block: states.__setitem__(block, oracle._hidden(output))
        )
        for block in (*depths, tiny.LAYERS - 1)
        if block != SAFETY
    ]
    try:
        oracle.logits_with_state(judge, inputs, SAFETY, projection)
    finally:
        for handle in handles:
            handle.remove()
    for block, node in depths.items():
        with torch.no_grad():
            wanted = judge.model.language_model.norm(states[block][:, -1])  # (batch, hidden), padded on the left
        assert np.abs(found.more[node] - wanted.numpy()).max() < 1e-4, block
    with torch.no_grad():
        ends = judge.model.language_model.norm(states[tiny.LAYERS - 1][:, -LAST_TOKENS:])  # (batch, tokens, hidden)
    assert np.abs(found.more[RECENT] - ends.mean(1).numpy()).max() < 1e-4


def test_all_devices_together_give_what_one_gives(tiny_model: Callable[..., Path], sets: tuple[str, str]) -> None:
    source = open_source(str(tiny_model("llava")))
    lane = rewrite_lane(trace_source(source), LaneSettings(SAFETY, SEMANTIC))
    processor, prompts = load_processor(source), load_all([sets[0]])
    found = []
    for device in ("cpu", SPREAD):
        with reading(load_model(source, dtype="float32", device=device), processor, lane) as read:
            found.append(read(prompts, [0, 1, 2]).projected)
    assert (found[0] == found[1]).all()


def test_answers_that_turn_into_the_refusal_are_counted(guard: Guards, sets: tuple[str, str], tmp_path: Path) -> None:
    """With every token judged, a harmless answer may be cut off: how often is what a user must know."""
    guarded = guard("llava", gate="every-token")
    found = evaluate(options_of(guarded, sets, tmp_path / "report"))
    assert found is not None and found.utility.identical is not None and found.utility.cut is not None
    same, cut = found.utility.identical, found.utility.cut
    assert 0 < cut.count == cut.total - same.count and cut.total == same.total
    report = (tmp_path / "report" / "report.md").read_text()
    assert f"{cut.count} of the {cut.total} ({cut.value:.1%}, 95 % interval" in report
    written = json.loads((tmp_path / "report" / "evaluate.json").read_text())["utility"]
    assert written["cut"]["count"] == cut.count


def test_variants_are_measured(run: tuple[Evaluated, Path]) -> None:
    found, out = run
    report, data = (out / "report.md").read_text(), json.loads((out / "evaluate.json").read_text())
    assert [variant.name for variant in found.variants] == ["the ends of both lanes", "the mean over the last 4 tokens"]
    base = found.depth[-1].auc.value  # the probe with projection, fitted alike
    for variant, written in zip(found.variants, data["variants"], strict=True):
        assert variant.gain.value == pytest.approx(variant.auc.value - base)
        without = found.overall["without"].detection
        assert without is not None and variant.over_plain.value == pytest.approx(variant.auc.value - without.auc.value)
        assert f"| {variant.name} | {variant.auc.value:.3f} (" in report
        assert written["auc"]["value"] == round(variant.auc.value, 4)
    wins = [variant.name for variant in found.variants if variant.gain.low > 0 and variant.over_plain.low > 0]
    assert (f"Better by more than noise: {', '.join(wins)}." if wins else "None wins beyond noise.") in report
    assert found.calibrated is not None
    before, after = found.calibrated.before, found.calibrated.after
    assert before.brier != after.brier and before.chance == after.chance
    assert f"Brier score {after.brier:.3f} against {before.brier:.3f}" in report


# ----------------------------------------------------------------------------------------- interruption, resuming


def test_an_interrupted_run_goes_on_and_ends_the_same(
    split_guard: Any,
    sets: tuple[str, str],
    run: tuple[Evaluated, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = options_of(split_guard, sets, tmp_path / "report")
    calls: list[int] = []
    answers = TorchModel.answers

    def counted(self: TorchModel, prompts: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 5:  # in the middle of the patched model's
            raise KeyboardInterrupt
        return answers(self, prompts)

    monkeypatch.setattr(TorchModel, "answers", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options)
    assert not options.out.exists() and (tmp_path / ".report.work").is_dir()
    with pytest.raises(LocateError, match="other: max_new_tokens"):
        evaluate(options_of(split_guard, sets, options.out, max_new_tokens=TOKENS + 1))
    evaluate(options)
    whole = len(list(batches(load_all([sets[0]]), 8)))
    assert len(calls) == 2 * whole + 1  # nothing but the batch that was cut off ran twice
    same = ("arms", "parts", "targets", "utility", "reliability", "fitted")
    before, after = (json.loads((out / "evaluate.json").read_text()) for out in (run[1], options.out))
    assert {name: before[name] for name in same} == {name: after[name] for name in same}
    assert (options.out / "answers.jsonl").read_bytes() == (run[1] / "answers.jsonl").read_bytes()
    assert not list(tmp_path.glob(".report*"))


def patch_and_evaluate(model: str, data: str, calibration: str, out: Path) -> None:
    """What one process and two do alike."""
    layers: dict[str, Any] = {"safety_layer": SAFETY, "semantic_layer": SEMANTIC, "batch_size": 8}
    sasa_export.patch(
        sasa_export.Options(
            model=model, out=out / "patched", calibration=(calibration,), max_false_positive_rate=0.2, verify="files",
            **layers,
        )
    )  # fmt: skip
    evaluate(
        EvaluateOptions(
            model=out / "patched", out=out / "report", data=(data,), timing=0, max_new_tokens=8, batch_size=8,
            depth_curve=True,
        )
    )  # fmt: skip
    locate(
        LocateOptions(
            model, out / "located", calibration=(calibration,), pairs="1:3,2:4", blocks="2-3", ablation_prompts=3,
            batch_size=8,
        ),
        Console(),
    )  # fmt: skip


def test_two_processes_calibrate_evaluate_and_locate_as_one(
    tiny_model: Callable[..., Path], sets: tuple[str, str], tmp_path: Path
) -> None:
    script = tmp_path / "two.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_evaluate import patch_and_evaluate\n"
        "patch_and_evaluate(*sys.argv[1:4], Path(sys.argv[4]))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = (str(tiny_model("llava")), *sets)
    patch_and_evaluate(*arguments, tmp_path / "one")
    done = subprocess.run(
        [*launcher, str(script), *arguments, str(tmp_path / "two")],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("propose") == 1, "one process speaks for all"
    files = ("patched/sasa-calibration.json", "patched/config.json", "report/answers.jsonl", "report/roc.png")
    for file in (*files, "located/locate.json", "located/heads.png", "located/report.html"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    one, two = (json.loads((tmp_path / name / "report/evaluate.json").read_text()) for name in ("one", "two"))
    assert one == two
    assert one["arms"]["patched"]["detection"]["auc"]["value"] > 0.6


# -------------------------------------------------------------------------------------------------- ONNX, command


def test_an_onnx_directory(
    tiny_model: Callable[..., Path],
    exported: Guards,
    split_guard: Any,
    sets: tuple[str, str],
    run: tuple[Evaluated, Path],
    tmp_path: Path,
) -> None:
    graphs = Path(shutil.copytree(exported(split_guard.directory), tmp_path / "graphs"))
    write_manifest(graphs, {}, options={"model": str(tiny_model("llava"))})
    options = options_of(split_guard, sets, tmp_path / "report", timing=2)
    found = evaluate(EvaluateOptions(**{**vars(options), "model": graphs}))
    assert found is not None and found.subject.format == "onnx" and found.subject.batch_size == 1
    torch_arm, arm = run[0].arm("patched"), found.arm("patched")
    assert torch_arm.scores is not None and arm.scores is not None
    assert np.abs(torch_arm.scores - arm.scores).max() < 1e-4
    assert (torch_arm.refused == arm.refused).all()
    assert found.utility.identical is not None and found.utility.spelled is not None
    assert found.utility.identical.value == found.utility.spelled.value == 1.0
    assert "runs in onnxruntime" in (tmp_path / "report/report.md").read_text()


def test_the_command(split_guard: Any, sets: tuple[str, str], tmp_path: Path) -> None:
    arguments = ["evaluate", "--model", str(split_guard.directory), "--data", sets[0], "--calibration", sets[1]]
    arguments += ["--out", str(tmp_path / "report"), "--limit", "8", "--timing", "0", "--max-new-tokens", "2"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "✗ AUC" in result.stderr or "✓ AUC" in result.stderr
    assert json.loads((tmp_path / "report/evaluate.json").read_text())["subject"]["left_out"] == 16
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1 and "is not empty" in again.stderr and "Traceback" not in again.output


# ------------------------------------------------------------------------------------------------------- errors


def changed(guard: Any, out: Path) -> Path:
    return Path(shutil.copytree(guard.directory, out))


def test_data_that_does_not_suffice(split_guard: Any, sets: tuple[str, str], tmp_path: Path) -> None:
    lines = Path(sets[0]).read_text().splitlines()
    for label, what in ((1, "no harmless prompts"), (0, "no harmful prompts")):
        path = Path(sets[0]).with_name(f"only-{label}.jsonl")
        path.write_text("\n".join(line for line in lines if json.loads(line)["label"] == label))
        options = options_of(split_guard, (str(path), sets[1]), tmp_path / "report")
        with pytest.raises(EvaluateError, match=what):
            evaluate(options)
    with pytest.raises(sasa_export.SasaExportError, match="the sets leak"):
        evaluate(options_of(split_guard, (sets[1], sets[1]), tmp_path / "report"))
    assert not any(tmp_path.iterdir())


def test_what_is_no_patched_model(
    split_guard: Any, sets: tuple[str, str], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(EvaluateError, match="there is no directory"):
        open_guarded(tmp_path / "absent")
    with pytest.raises(EvaluateError, match="has no gate"):
        open_guarded(tiny_model("llava"))
    edited = changed(split_guard, tmp_path / "edited")
    with (edited / "modeling_sasa.py").open("a") as file:
        file.write("\n# a comment\n")
    with pytest.raises(EvaluateError, match=r"is not what was exported .1 differ: modeling_sasa.py"):
        open_guarded(edited)
    for name in ("safetensors", "onnx"):
        (tmp_path / "both" / name).mkdir(parents=True)
        (tmp_path / "both" / name / "config.json").write_text("{}")
    with pytest.raises(EvaluateError, match="holds two patched models"):
        open_guarded(tmp_path / "both")


def test_a_baseline_that_is_another_model(split_guard: Any, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    guarded = open_guarded(split_guard.directory)
    assert open_baseline(guarded, None).directory == tiny_model("llava")
    with pytest.raises(EvaluateError, match="is none of the weights"):
        open_baseline(guarded, str(tiny_model("llava", seed=5)))
    with pytest.raises(EvaluateError, match="has 4 blocks"):
        open_baseline(guarded, str(tiny_model("llava", num_hidden_layers=4)))
    with pytest.raises(sasa_export.SasaExportError, match="there is no model"):
        open_baseline(guarded, "no-such-model")
    moved = open_guarded(split_guard.directory)
    moved.made["model"] = str(tmp_path / "moved")
    with pytest.raises(EvaluateError, match="Or give --baseline"):
        open_baseline(moved, None)
    moved.made.pop("model")
    with pytest.raises(EvaluateError, match="does not say what it was made from"):
        open_baseline(moved, None)


def test_a_calibration_set_that_has_gone(split_guard: Any, sets: tuple[str, str], tmp_path: Path) -> None:
    options = options_of(split_guard, sets, tmp_path / "report")
    with pytest.raises(sasa_export.SasaExportError, match="there is no calibration file"):
        evaluate(EvaluateOptions(**{**vars(options), "calibration": (str(tmp_path / "gone.jsonl"),)}))
    with pytest.raises(EvaluateError, match="has no function absent"):
        evaluate(EvaluateOptions(**{**vars(options), "judge": "json:absent"}))
    with pytest.raises(sasa_export.SasaExportError, match="would remove that"):
        evaluate(EvaluateOptions(**{**vars(options), "out": split_guard.directory.parent, "force": True}))
