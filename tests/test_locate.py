"""Locating layers: a model with planted layers, interruptions, family files, and what users do."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
from click.testing import CliRunner
from PIL import Image
from sklearn.metrics import roc_auc_score

from sasa_export import Options, SasaExportError, families, patch
from sasa_export.cli import main
from sasa_export.errors import EmitError
from sasa_export.research.locate import Located, LocateError, LocateOptions, locate
from sasa_export.research.locate.family_file import with_entry
from sasa_export.research.locate.lane import MainLane
from sasa_export.research.locate.work import Work

Stock = Callable[..., tuple[Any, Any]]


@pytest.fixture(scope="session")
def planted_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.build(tmp_path_factory.mktemp("planted") / "planted")


@pytest.fixture(scope="session")
def report(planted_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Located, Path]:
    """A whole run on the planted model, and its report."""
    out = tmp_path_factory.mktemp("located") / "report"
    located = locate(LocateOptions(str(planted_model), out, ablation_prompts=8), prompts=planted.prompts(24))
    assert located is not None
    return located, out


def quick(model: Path, out: Path, **settings: Any) -> LocateOptions:
    """A run of two pairs and two blocks' heads."""
    return LocateOptions(str(model), out, **{"ablation_prompts": 4, "blocks": "2-3", "pairs": "2:5,3:6", **settings})


# ------------------------------------------------------------------------------------- the planted model


def test_the_planted_layers_are_proposed(report: tuple[Located, Path]) -> None:
    proposal = report[0].proposal
    assert (proposal.safety, proposal.semantic) == (planted.SAFETY, planted.SEMANTIC)
    assert proposal.safety_blocks == (planted.SAFETY,)
    assert proposal.semantic_blocks == (planted.SEMANTIC, planted.SEMANTIC + 1)


def test_each_capability_appears_where_it_was_planted(report: tuple[Located, Path]) -> None:
    located = report[0]
    text = [estimate.value for estimate in located.separability.channels["text"]]
    assert text[: planted.SAFETY] == [0.5] * planted.SAFETY
    assert text[planted.SAFETY] > 0.95 and max(text[planted.SAFETY + 1 :]) < 0.9
    assert located.alignment is not None
    aligned = [estimate.value for estimate in located.alignment.text]
    assert aligned[: planted.SEMANTIC] == [0.0] * planted.SEMANTIC and aligned[planted.SEMANTIC] > 0.8
    alone = [estimate.value for estimate in located.alignment.image]
    assert alone[planted.SEMANTIC] == pytest.approx(1.0, abs=1e-3)
    assert located.expression.onset() == planted.VOICE
    assert located.expression.readable[planted.VOICE - 1] == 0.0
    # Only a second lane that begins at the planted layer ends in a separable state.
    auc = {pair: estimate.value for pair, estimate in located.sweep.pairs.items()}
    assert auc[planted.SAFETY, planted.SEMANTIC] > 0.99
    assert max(value for (safety, _), value in auc.items() if safety != planted.SAFETY) < 0.96
    assert located.sweep.plain.value < 0.9
    assert located.held_out.auc > 0.9


def test_all_pairs_together(report: tuple[Located, Path]) -> None:
    """The mean of the log-odds, which one strong pair among weak ones does not carry."""
    located, out = report
    odds = sum(np.log(scores / (1 - scores)) for scores in located.sweep.scores.values())  # (prompts,)
    labels = [prompt.label for prompt in planted.prompts(24)]
    together, chosen = located.sweep.together, located.sweep.pairs[planted.SAFETY, planted.SEMANTIC]
    assert together is not None and together.value == pytest.approx(roc_auc_score(labels, odds), abs=1e-6)
    assert 0.5 < together.value < chosen.value
    said = "which is not better than the chosen pair by more than noise"
    assert f"have an AUC of {together}, {said}." in (out / "report.md").read_text(encoding="utf-8")


def test_the_planted_safety_head_is_the_only_one(report: tuple[Located, Path]) -> None:
    heads = report[0].heads
    assert heads is not None
    assert [head[:2] for head in heads.safety_heads()] == [planted.SAFETY_HEAD]
    assert heads.centre() == planted.SAFETY
    assert heads.reliability is not None and heads.reliability > 0.5
    # Others turn both kinds of prompts, by more degrees than the safety head does.
    assert heads.ordinary[planted.VOICE, 1] > heads.harmful[planted.SAFETY_HEAD] > heads.ordinary[planted.SAFETY_HEAD]


def test_the_report_is_whole_and_needs_no_network(report: tuple[Located, Path]) -> None:
    located, out = report
    names = {"depth.png", "heads.png", "sweep.png", "tsne.png", "report.html", "report.md", "locate.json"}
    assert {path.name for path in out.iterdir()} == names
    assert [path.name for path in out.parent.iterdir()] == [out.name], "nothing is left beside the report"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|url\(|@import", page)
    sources = re.findall(r'(?:src|srcset|href)="(.{0,30})', page)
    assert len(sources) == 8 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert f"safety layer {planted.SAFETY}, semantic layer {planted.SEMANTIC}" in page
    for name in ("depth", "heads", "sweep", "tsne"):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.format == "PNG" and picture.width == 910
            assert len(np.unique(np.asarray(picture))) > 10, "a picture of one colour shows nothing"
    data = json.loads((out / "locate.json").read_text(encoding="utf-8"))
    assert (data["proposal"]["safety_layer"], data["proposal"]["semantic_layer"]) == (planted.SAFETY, planted.SEMANTIC)
    assert len(data["safety_perception"]["all"]) == planted.BLOCKS and len(data["sweep"]["pairs"]) == 28
    assert "![" in (out / "report.md").read_text(encoding="utf-8") and located.subject.model == "planted"


def test_a_report_shows_any_token(report: tuple[Located, Path], tmp_path: Path) -> None:
    """What a model might say ends up in a table, so it must not end up as markup."""
    from sasa_export.research.locate.page import page

    located = report[0]
    strange = replace(located.example, words=(("<b>", "&amp", "a|b", "\n", "\ufffd"),) * planted.BLOCKS)
    text = page(replace(located, example=strange), *({name: b"" for name in ("depth", "heads", "sweep", "tsne")},) * 2)
    assert "<b>" not in text and "&lt;b&gt;" in text and "&amp;amp" in text


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "smolvlm"])
def test_a_whole_run_on_other_families(
    tiny_model: Callable[..., Path], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sasa_export.research.locate.run.points", lambda states: states[:, :2])  # t-SNE knows no family
    options = quick(tiny_model(family), tmp_path / "report", pairs="1:3", blocks="2", limit=20, ablation_prompts=2)
    located = locate(options)
    assert located is not None and located.subject.family == family and located.subject.groups == 20
    assert (located.proposal.safety, located.proposal.semantic) == (1, 3)
    assert located.alignment is not None and located.alignment.requests == 40
    assert located.heads is not None and located.heads.scores.shape == (1, 4)
    assert located.heads.prompts == 2 and located.heads.reliability is None, "two prompts have no halves to compare"
    assert (tmp_path / "report/report.html").is_file()


# ---------------------------------------------------------------------------------------- interruptions


class Stop(BaseException):
    """Stands for Ctrl-C."""


@pytest.fixture(scope="session")
def uninterrupted(planted_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a quick run on 12 pairs."""
    out = tmp_path_factory.mktemp("whole") / "report"
    locate(quick(planted_model, out), prompts=planted.prompts(12))
    return out


@pytest.mark.parametrize("after", [3, 12])  # among the batches, among the heads
def test_an_interrupted_run_goes_on_and_ends_alike(
    planted_model: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    prompts = planted.prompts(12)
    put = Work.put
    written: list[str] = []

    def counted(self: Work, name: str, array: np.ndarray) -> None:
        if len(written) == after:
            raise Stop
        put(self, name, array)
        written.append(name)

    out = tmp_path / "cut/report"
    with monkeypatch.context() as patched:
        patched.setattr(Work, "put", counted)
        with pytest.raises(Stop):
            locate(quick(planted_model, out), prompts=prompts)
    assert not out.exists()
    left = {path.stem for path in (out.parent / ".report.work").glob("*.npy")}
    assert left == set(written) and len(left) == after

    again: list[str] = []

    def noted(self: Work, name: str, array: np.ndarray) -> None:
        again.append(name)
        put(self, name, array)

    with monkeypatch.context() as patched:
        patched.setattr(Work, "put", noted)
        located = locate(quick(planted_model, out), prompts=prompts)
    assert located is not None
    # What a batch's main lane left is written anew where the batch had not come to its end.
    assert not left & {name for name in again if "lane" in name or "block" in name}, "finished work was done again"
    for path in uninterrupted.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    assert [path.name for path in out.parent.iterdir()] == ["report"]


def test_other_settings_do_not_go_on_with_unfinished_work(
    planted_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        raise Stop

    out = tmp_path / "report"
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(MainLane, "run", stop)
        locate(quick(planted_model, out), prompts=planted.prompts(12))
    assert not list(tmp_path.iterdir()), "nothing was finished, so there is nothing to go on with"
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr("sasa_export.research.locate.run.survey", stop)
        locate(quick(planted_model, out), prompts=planted.prompts(12))
    with pytest.raises(LocateError, match=r"unfinished work of another run \(other: prompts\)"):
        locate(quick(planted_model, out), prompts=planted.prompts(13))
    with pytest.raises(LocateError, match="other: batch_size"):
        locate(quick(planted_model, out, batch_size=3), prompts=planted.prompts(12))
    repainted = [
        replace(prompt, image=lambda: Image.new("RGB", (32, 32), (9, 9, 9))) if prompt.image else prompt
        for prompt in planted.prompts(12)
    ]
    with pytest.raises(LocateError, match="other: prompts"):
        locate(quick(planted_model, out), prompts=repainted)
    monkeypatch.setattr("sasa_export.research.locate.run.write_report", lambda located, directory: None)
    assert locate(quick(planted_model, out, force=True), prompts=planted.prompts(13)) is not None


def test_work_that_cannot_be_used(tmp_path: Path) -> None:
    work = Work.beside(tmp_path / "report")
    assert work.open({"model": "a"}, discard=False) == 0
    work.put("one", np.arange(3.0))
    assert work.open({"model": "a"}, discard=False) == 1 and work.has("one") and work.get("one").tolist() == [0, 1, 2]
    with pytest.raises(LocateError, match="not finite"):
        work.put("two", np.array([1.0, math.nan]))
    assert not work.has("two")
    (work.folder / "one.npy").write_bytes(b"")
    with pytest.raises(LocateError, match=r"one\.npy is damaged"):
        work.get("one")
    with pytest.raises(LocateError, match="another run"):
        work.open({"model": "b"}, discard=False)
    assert work.open({"model": "b"}, discard=True) == 0 and not work.has("one")
    work.remove()
    assert not work.folder.exists()


# ---------------------------------------------------------------------------------------- family files


@pytest.fixture
def family_file(tmp_path: Path) -> Path:
    path = tmp_path / "llava.toml"
    path.write_text((families.directory() / "llava.toml").read_text(encoding="utf-8"), encoding="utf-8")
    return path


def test_the_layers_are_written_into_a_family_file(
    report: tuple[Located, Path], planted_model: Path, family_file: Path
) -> None:
    from sasa_export.models import open_source
    from sasa_export.research.locate.family_file import check_family, write_family

    located, source = report[0], open_source(str(planted_model))
    before = families.read(family_file)
    text = family_file.read_text(encoding="utf-8")
    check_family(family_file, source)
    write_family(family_file, source, located)
    entry = families.read(family_file).known_layers(planted.BLOCKS, planted.HIDDEN)
    assert entry is not None and (entry.safety, entry.semantic) == (planted.SAFETY, planted.SEMANTIC)
    assert entry.checkpoint == "planted" and "72 prompts" in entry.source
    assert families.read(family_file).layers[:-1] == before.layers
    assert family_file.read_text(encoding="utf-8").startswith(text.rstrip())

    # A second time it replaces its entry, and a new file begins as the family's own.
    other = replace(located, proposal=replace(located.proposal, safety=1))
    sweep = {**located.sweep.pairs}
    write_family(family_file, source, replace(other, sweep=replace(located.sweep, pairs=sweep)))
    again = families.read(family_file)
    assert len(again.layers) == len(before.layers) + 1
    assert again.known_layers(planted.BLOCKS, planted.HIDDEN).safety == 1  # type: ignore[union-attr]
    fresh = family_file.with_name("fresh.toml")
    write_family(fresh, source, located)
    assert families.read(fresh).modules == before.modules and len(families.read(fresh).layers) == len(before.layers) + 1
    assert sorted(path.name for path in family_file.parent.iterdir()) == ["fresh.toml", "llava.toml"]


def test_an_entry_is_replaced_where_it_stands() -> None:
    text = (
        'model_types = ["x"]\n\n[[layers]]\n# why\ncheckpoint = "a/b"\nblocks = 4\nhidden = 8\nsafety = 0\n'
        'semantic = 1\nsource = "old"\n\n# about the next\n'
        '[[layers]]\ncheckpoint = "c/d"\nblocks = 5\nhidden = 8\nsafety = 0\nsemantic = 1\n'
        'source = "[not a table]"\n\n[peculiar]\nmasks = "none"\n'
    )
    entry = families.KnownLayers("a/b", 4, 8, 1, 2, 'say "so" \\ é')
    found = with_entry(text, entry)
    assert found.count("[[layers]]") == 2 and '"old"' not in found and "# about the next\n[[layers]]" in found
    assert found.endswith('[peculiar]\nmasks = "none"\n')
    import tomllib

    layers = tomllib.loads(found)["layers"]
    assert layers[0]["source"] == 'say "so" \\ é' and layers[1]["source"] == "[not a table]"


def test_a_family_file_that_cannot_take_the_entry(
    report: tuple[Located, Path], planted_model: Path, family_file: Path
) -> None:
    """An inline list of layers is valid, and nothing can be put behind it: it stays as it is."""
    from sasa_export.models import open_source
    from sasa_export.research.locate.family_file import write_family

    text = family_file.read_text(encoding="utf-8").partition("[[layers]]")[0]
    inline = 'layers = [{checkpoint = "x", blocks = 8, hidden = 32, safety = 0, semantic = 1, source = "y"}]\n'
    family_file.write_text(inline + text, encoding="utf-8")
    with pytest.raises(SasaExportError):
        write_family(family_file, open_source(str(planted_model)), report[0])
    assert family_file.read_text(encoding="utf-8") == inline + text
    assert [path.name for path in family_file.parent.iterdir()] == [family_file.name]


# ------------------------------------------------------------------------------------- the command line


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["locate", *arguments])


def test_locate_from_the_command_line(planted_model: Path, tmp_path: Path, family_file: Path) -> None:
    lines = []
    for prompt in planted.prompts(12):
        if prompt.image is None:
            lines.append(
                json.dumps({"image": None, "prompt": prompt.prompt, "label": prompt.label, "group": prompt.group})
            )
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    arguments = ["--model", str(planted_model), "--out", str(tmp_path / "report"), "--calibration"]
    arguments += [str(tmp_path / "prompts.jsonl"), "--ablation-prompts", "0", "--write-family", str(family_file)]
    result = invoke(*arguments, "--pairs", "2:5,3:5")
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "report/locate.json").read_text(encoding="utf-8"))
    assert data["proposal"]["safety_layer"] == 2 and data["proposal"]["semantic_layer"] == 5
    assert data["safety_heads"] is None and data["semantic_understanding"] is None
    assert not (tmp_path / "report/heads.png").exists()
    assert families.read(family_file).known_layers(planted.BLOCKS, planted.HIDDEN) is not None
    # A report that is there is kept.
    result = invoke(*arguments)
    assert result.exit_code == 1 and "not empty" in result.output and result.output.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--limit", "0"), "--limit is 0"),
        (("--limit", "3"), "raise --limit"),
        (("--batch-size", "0"), "--batch-size is 0"),
        (("--ablation-prompts", "-1"), "--ablation-prompts is -1"),
        (("--ablation-prompts", "0", "--blocks", "1-2"), "leaves that out"),
        (("--blocks", "3-9"), "--blocks has '3-9'"),
        (("--pairs", "7:8"), "--pairs has '8'"),
        (("--write-family", "layers.json"), "ends in .toml"),
        (("--write-family", "nowhere/llava.toml"), "no folder"),
        (("--calibration", "nothing.jsonl"), "nothing.jsonl"),
        (("--device", "teapot"), "--device teapot"),
        (("--model", "teapot"), "no model 'teapot'"),
    ],
)
def test_errors_are_one_line(planted_model: Path, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    out = tmp_path / "room/report"
    out.parent.mkdir()
    model = () if "--model" in arguments else ("--model", str(planted_model))
    result = invoke(*model, "--out", str(out), *arguments)
    assert result.exit_code == 1 and said in result.output, result.output
    errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and not list(out.parent.iterdir()), "an error leaves nothing behind"


def test_another_familys_file(planted_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "gemma3.toml"
    path.write_text((families.directory() / "gemma3.toml").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(LocateError, match="file of the model's own family"):
        locate(LocateOptions(str(planted_model), tmp_path / "report", write_family=path))


def test_the_model_itself_is_not_replaced(planted_model: Path) -> None:
    with pytest.raises(EmitError, match="source model"):
        locate(LocateOptions(str(planted_model), planted_model, force=True))
    assert (planted_model / "config.json").is_file()


# ---------------------------------------------------------------------------------- auto, in a patch


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted texts as a JSONL file."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    texts = [prompt for prompt in planted.prompts(48) if prompt.image is None]
    lines = [json.dumps({"image": None, "prompt": t.prompt, "label": t.label, "group": t.group}) for t in texts]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "safety, semantic, expected",
    [("auto", "auto", (2, 3)), ("auto", 5, (2, 5)), (2, "auto", (2, 3)), ("auto", None, (2, 3))],
)
def test_auto_layers(
    planted_model: Path, calibration: Path, tmp_path: Path, safety: Any, semantic: Any, expected: tuple[int, int]
) -> None:
    """Texts alone say nothing of meaning, so the semantic layer is merely the cheapest; the safety layer is planted."""
    options = Options(str(planted_model), tmp_path / "out", calibration=(str(calibration),), verify="files")
    patched = patch(replace(options, safety_layer=safety, semantic_layer=semantic))
    config = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))["sasa"]
    assert (config["safety_layer"], config["semantic_layer"]) == expected
    assert "on one half of the calibration prompts" in config["layers_from"]
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert config["layers_from"] in card
    # The figures are of the half that took no part; the scores are of all.
    assert patched.calibration is not None
    figure = next(found for found in patched.calibration.figures if found.channel in ("all", "text"))
    assert figure.prompts == 48 and len(patched.calibration.prompts) == 96 and figure.auc > 0.95


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"safety_layer": "otto"}, "--safety-layer is 'otto'"),
        ({"safety_layer": "auto", "probe": Path("p.safetensors")}, "exclude each other"),
        ({"safety_layer": 7, "semantic_layer": "auto"}, "do not fit"),
    ],
)
def test_auto_that_cannot_be(planted_model: Path, tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SasaExportError, match=said):
        patch(Options(str(planted_model), tmp_path / "out", **settings))


def test_auto_on_the_command_line(planted_model: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(planted_model), "--out", str(tmp_path / "out"), "--safety-layer"]
    result = CliRunner().invoke(main, [*arguments, "otto"])
    assert result.exit_code == 2 and "neither a whole number nor 'auto'" in result.output
    short = tmp_path / "short.jsonl"
    record = {"image": None, "prompt": "tell me", "label": 0}
    lines = [json.dumps({**record, "label": row % 2, "group": f"{row // 2}"}) for row in range(24)]
    short.write_text("\n".join(lines), encoding="utf-8")
    result = CliRunner().invoke(main, [*arguments, "auto", "--calibration", str(short)])
    assert (
        result.exit_code == 1 and "6 groups with harmful prompts" in result.output and not (tmp_path / "out").exists()
    )
