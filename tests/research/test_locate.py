"""Locating layers: a model with planted layers, interruptions, family files, and what users do."""

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
from cli_steps import Stop, fails, succeeds
from PIL import Image

from sasa_export import Options, SasaExportError, patch
from sasa_export.probe.work import resumable
from sasa_export.report import Silent
from sasa_export.research.locate.run import Located, locate, write
from sasa_export.research.options import EvaluateOptions, LocateOptions
from sasa_export.research.report import made_with

pytestmark = pytest.mark.xdist_group("locate")  # whose model and report are shared
Report = tuple[Located, Path]


@pytest.fixture(scope="session")
def planted_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.build(tmp_path_factory.mktemp("planted") / "planted")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A JSONL file without pictures."""
    return planted.write_set(tmp_path_factory.mktemp("texts") / "texts.jsonl", 48, pictures=False)


@pytest.fixture(scope="session")
def report(planted_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A whole run on the planted model, and its report."""
    place = tmp_path_factory.mktemp("located")
    prompts = planted.write_set(tmp_path_factory.mktemp("prompts") / "planted.jsonl", 24)
    located = locate(LocateOptions(str(planted_model), place / "report", calibration=(prompts,), lane_tokens=64))
    assert located is not None
    return located, place / "report"


def test_each_capability_is_found_where_it_was_planted(report: Report) -> None:
    located, evidence = report[0], report[0].evidence
    assert located.proposal.pair == (planted.SAFETY, planted.SEMANTIC)
    assert located.proposal.safety_blocks == (planted.SAFETY,)
    assert located.proposal.semantic_blocks == (planted.SEMANTIC, planted.SEMANTIC + 1)
    text = [estimate.value for estimate in evidence.perception["text"]]
    assert text[: planted.SAFETY] == [0.5] * planted.SAFETY
    assert text[planted.SAFETY] > 0.95 and max(text[planted.SAFETY + 1 :]) < 0.9
    assert evidence.understanding is not None
    aligned = [estimate.value for estimate in evidence.understanding["text_only"]]
    assert aligned[: planted.SEMANTIC] == [0.0] * planted.SEMANTIC and aligned[planted.SEMANTIC] > 0.8
    assert evidence.understanding["image_dominant"][planted.SEMANTIC].value == pytest.approx(1.0, abs=1e-3)
    assert evidence.expression.onset == planted.VOICE and evidence.expression.readable[planted.VOICE - 1] == 0.0


def test_only_a_second_lane_from_the_planted_layer_separates(report: Report) -> None:
    swept = report[0].evidence.sweep
    auc = {pair: estimate.value for pair, estimate in swept.pairs.items()}
    assert len(auc) == 28 and auc[planted.SAFETY, planted.SEMANTIC] > 0.99 and swept.plain.value < 0.9
    assert max(value for (safety, _), value in auc.items() if safety != planted.SAFETY) < 0.96
    assert report[0].held_out_auc > 0.9


def test_the_report_is_whole_and_needs_no_network(report: Report) -> None:
    out, pictures = report[1], ("depth", "sweep")
    names = {"report.html", "report.md", "locate.json", "sasa-export.json", *(f"{name}.png" for name in pictures)}
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in out.parent.iterdir()] == [out.name], "nothing is left beside the report"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|url\(|@import", page)
    sources = re.findall(r'(?:src|srcset|href)="(.{0,30})', page)
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    for text in (page, (out / "report.md").read_text(encoding="utf-8")):
        assert f"safety layer {planted.SAFETY}, semantic layer {planted.SEMANTIC} of 8 blocks" in text
    for name in pictures:
        with Image.open(out / f"{name}.png") as picture:
            assert len(np.unique(np.asarray(picture))) > 10, "a picture of one colour shows nothing"
    data = json.loads((out / "locate.json").read_text(encoding="utf-8"))
    assert (data["proposal"]["safety_layer"], data["proposal"]["semantic_layer"]) == (planted.SAFETY, planted.SEMANTIC)
    assert len(data["safety_perception"]["all"]) == planted.BLOCKS and len(data["sweep"]["pairs"]) == 28


def test_a_report_shows_any_name(report: Report, tmp_path: Path) -> None:
    """What a model is called must not end up as markup."""
    strange = {**report[0].subject, "model": "<i>![x](y)</i> &amp __x__"}
    write(replace(report[0], subject=strange), LocateOptions(out=tmp_path / "report"))
    page = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    assert not re.search("<i>", page) and "<title>Where &lt;i&gt;" in page
    assert page.count("&lt;i&gt;![x](y)&lt;/i&gt; &amp;amp __x__") == 2


# ---------------------------------------------------------------------------------------- interruptions


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_ends_alike(
    planted_model: Path, tmp_path: Path, stopped_at: Callable[..., list[str]]
) -> None:
    prompts = planted.write_set(tmp_path / "planted.jsonl", 12)
    whole, out = tmp_path / "whole/report", tmp_path / "cut/report"
    options = LocateOptions(str(planted_model), whole, calibration=(prompts,), pairs="2:5,3:6")
    locate(options)
    for stop in (1, 18, None):  # among the batches, among the controls, not at all
        written = stopped_at(stop)
        with pytest.raises(Stop) if stop else nullcontext():
            locate(replace(options, out=out))
        if stop:
            assert not out.exists() and {path.stem for path in out.parent.glob(".report.work/*.npy")} == set(written)
            with pytest.raises(SasaExportError, match=r"unfinished work of another run \(other: batch_size, prompts\)"):
                locate(replace(options, out=out, batch_size=3, limit=11))
    # What a batch's main lane left is written anew where it had not come to its end.
    parts = [name for name in written if "lane" in name]
    assert len(parts) == len(set(parts)), "finished work was done again"
    for path in whole.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert [path.name for path in out.parent.iterdir()] == ["report"]


def test_work_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(Stop), resumable(tmp_path / "report", force=False, report=Silent()) as work:
        work.open({"model": "a"}, discard=False, report=Silent())
        raise Stop
    assert not work.folder.exists(), "nothing was finished, so there is nothing to go on with"
    work.open({"model": "a"}, discard=False, report=Silent())
    work.put("one", np.arange(3.0))
    work.open({"model": "a"}, discard=False, report=Silent())
    assert work.get("one").tolist() == [0, 1, 2]
    with pytest.raises(SasaExportError, match="not finite"):
        work.put("two", np.array([1.0, np.nan]))
    (work.folder / "one.npy").write_bytes(b"")
    with pytest.raises(SasaExportError, match=r"one\.npy is damaged"):
        work.get("one")
    with pytest.raises(SasaExportError, match="another run"):
        work.open({"model": "b"}, discard=False, report=Silent())
    work.open({"model": "b"}, discard=True, report=Silent())
    assert not work.has("one") and not work.has("two")


# ------------------------------------------------------------------------------------- the command line


def test_the_command_of_a_report_has_what_differs_from_the_defaults(tmp_path: Path) -> None:
    """It names no place of this machine, and flags come as the command line takes them."""
    (tmp_path / "my model").mkdir()
    options = EvaluateOptions(
        tmp_path / "my model", tmp_path / "out", data=("xstest:x.csv", "b.jsonl"), limit=7, device="cpu", force=True
    )
    said = "sasa-export evaluate --model 'my model' --data xstest:x.csv --data b.jsonl --limit 7"
    assert made_with("evaluate", options).startswith(f"`{said} --out report`, sasa-export ")
    located = LocateOptions("smol-llava", tmp_path / "out", pairs="13:15")
    said = "sasa-export locate --model smol-llava --pairs 13:15"
    assert made_with("locate", located).startswith(f"`{said} --out report`, sasa-export ")


def test_locate_from_the_command_line(planted_model: Path, tmp_path: Path, texts: str) -> None:
    arguments = ["locate", "--model", str(planted_model), "--out", str(tmp_path / "report"), "--calibration", texts]
    arguments += ["--limit", "12"]
    succeeds(*arguments, "--pairs", "2:5,3:5")
    data = json.loads((tmp_path / "report/locate.json").read_text(encoding="utf-8"))
    assert data["proposal"]["safety_layer"] == 2 and data["proposal"]["semantic_layer"] == 5
    assert data["semantic_understanding"] is None
    assert "not empty" in fails(*arguments)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--limit", "3"), "raise --limit"),
        (("--pairs", "3:9"), "--pairs has '3:9'"),
        (("--calibration", "nothing.jsonl"), "nothing.jsonl"),
        (("--out", "{model}", "--force"), "did not write"),
    ],
)
def test_errors_are_one_line(planted_model: Path, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    more = [argument.format(model=planted_model) for argument in arguments]
    assert said in fails("locate", "--model", str(planted_model), "--out", str(tmp_path / "report"), *more)
    assert (planted_model / "config.json").is_file()


# ---------------------------------------------------------------------------------- auto, in a patch


@pytest.mark.parametrize(
    "safety, semantic, expected",
    [
        (2, "auto", (2, 3)),
        *(pytest.param("auto", given, (2, f), marks=pytest.mark.slow) for given, f in ((5, 5), (None, 3))),
    ],
)
def test_auto_layers(
    planted_model: Path, texts: str, tmp_path: Path, safety: Any, semantic: Any, expected: tuple[int, int]
) -> None:
    """Texts alone say nothing of meaning, so the semantic layer is merely the cheapest; the safety layer is planted."""
    options = Options(str(planted_model), tmp_path / "out", calibration=(texts,), verify="files", lane_tokens=64)
    patched = patch(replace(options, safety_layer=safety, semantic_layer=semantic))
    config = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))["sasa"]
    assert (config["safety_layer"], config["semantic_layer"]) == expected
    assert "on one half of the calibration prompts" in config["layers_from"]
    assert config["layers_from"] in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    # The figures are of the half that took no part; the scores are of all.
    assert patched.calibration is not None
    figure = next(found for found in patched.calibration.figures if found.part in ("all", "text"))
    assert figure.prompts == 48 and len(patched.calibration.prompts) == 96 and figure.auc > 0.95


def test_auto_needs_enough_prompts_in_either_half(planted_model: Path, tmp_path: Path) -> None:
    short = planted.write_set(tmp_path / "short.jsonl", 12, pictures=False)
    out = ("--out", str(tmp_path / "out"), "--calibration", short)
    said = fails("--model", str(planted_model), *out, "--safety-layer", "auto")
    assert "6 groups with harmful prompts" in said
