"""`evaluate`, `locate` and layers left to `auto`, of graphs that somebody else exported."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import foreign_graphs
import numpy as np
import onnx_ir as ir
import pytest
from labelled import write_set

import sasa_export
from sasa_export.backends.onnx_graphs import GraphOriginal
from sasa_export.errors import EvaluateError, SasaExportError
from sasa_export.graph.rewrite import LaneSettings
from sasa_export.onnx.blocks import find_blocks
from sasa_export.onnx.run import Model
from sasa_export.probe.work import Results, Work
from sasa_export.prompts import load_all
from sasa_export.prompts.prompt import Prompt, encoded
from sasa_export.report import Silent
from sasa_export.research.evaluate.run import evaluate
from sasa_export.research.locate.run import locate
from sasa_export.research.options import EvaluateOptions, LocateOptions

pytestmark = pytest.mark.xdist_group("foreign")
TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("research")


@pytest.fixture(scope="module")
def decoder(folder: Path) -> GraphOriginal:
    return GraphOriginal(str(foreign_graphs.write(folder / "source")))


@pytest.fixture(scope="module")
def sets(folder: Path) -> tuple[str, str]:
    return str(write_set(folder, "evaluation", 1, 12)), str(write_set(folder, "calibration", 2, 60))


def texts(data: str) -> list[Prompt]:
    return [prompt for prompt in load_all([data]) if prompt.image is None]


@pytest.fixture(scope="module")
def expected(decoder: GraphOriginal, sets: tuple[str, str]) -> dict[str, Any]:
    return foreign_graphs.probe_amid(decoder, texts(sets[0]))


@pytest.fixture(scope="module")
def options(decoder: GraphOriginal, folder: Path, expected: dict[str, Any], sets: tuple[str, str]) -> EvaluateOptions:
    source, settings = decoder.source.directory, {"threshold": 0.5, "verify": "files"}
    sasa_export.patch(foreign_graphs.options(source, folder, expected["weight"], expected["bias"], **settings))
    return EvaluateOptions(
        folder / "out", folder / "report", data=(sets[0],), calibration=(sets[1],), max_new_tokens=TOKENS
    )


def test_an_evaluation_asks_the_graphs_that_were_patched(
    options: EvaluateOptions, decoder: GraphOriginal, expected: dict[str, Any]
) -> None:
    found = evaluate(options)
    assert found is not None
    table, flagged = found.answers, expected["expected"] >= 0.5
    assert 0 < flagged.sum() < len(flagged)
    np.testing.assert_allclose(table.patched_unsafe_probability, expected["expected"], atol=1e-5)
    assert found.arms["patched"]["attack"].count == (~flagged & (table.label == 1)).sum()
    assert found.identical is not None and found.identical.count == found.identical.total > 0
    assert found.emitted is not None and found.emitted.count == found.emitted.total == flagged.sum()
    assert {"words", "without"} <= set(found.arms)
    original = Model(decoder.source.directory, told={"graphs": decoder.graphs.files})
    for row, prompt in enumerate(texts(options.data[0])):
        tokens = original.answer(encoded(decoder.processor, prompt), TOKENS)[2]
        assert table.plain_answer[row] == decoder.processor.tokenizer.decode(tokens, skip_special_tokens=True)
    assert "texts alone, since pictures cannot be run" in (options.out / "report.md").read_text()


def test_another_original_is_refused(options: EvaluateOptions, tmp_path: Path) -> None:
    other = foreign_graphs.write(tmp_path / "other")
    data = bytearray((other / "model.onnx_data").read_bytes())
    data[-1] ^= 1
    (other / "model.onnx_data").write_bytes(data)
    with pytest.raises(EvaluateError, match=re.escape(f"was not made from {other}")):
        evaluate(replace(options, out=tmp_path / "report", baseline=str(other)))
    options = replace(options, out=tmp_path / "report")
    for changed in (replace(options, dtype="float16"), replace(options, device="cuda")):
        with pytest.raises(SasaExportError, match=r"is not of use with ONNX graphs"):
            evaluate(changed)


def test_a_survey_reads_what_the_graphs_compute(decoder: GraphOriginal, sets: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    work = Work(tmp_path / "work")
    settings: dict[str, Any] = {"batch_size": 16, "regularization": 1.0, "tokens": 4}
    evidence = decoder.survey(texts(sets[1]), [(1, 2)], work, Silent(), **settings)
    assert evidence is not None
    row, results = 7, Results(work, "prompts", texts(sets[1]), 16)
    inputs = encoded(decoder.processor, results.prompts[row])
    graph = ir.from_proto(foreign_graphs.decoder())
    blocks = find_blocks(graph, None)
    *states, normed, logits = foreign_graphs.run(graph, inputs, [*blocks.states, blocks.norm, blocks.logits])
    np.testing.assert_allclose(results.read("states")[row], [state[0, -1] for state in states], atol=1e-5)
    np.testing.assert_allclose(results.read("plain")[row], normed[0, -1], atol=1e-5)
    assert results.read("tokens")[row, -1].tolist() == np.argsort(-logits[0, -1])[:5].tolist()
    second = decoder.lanes(LaneSettings(1, 2, tokens=4), alone=True).prompt(inputs)["projected"].numpy()[0]
    np.testing.assert_allclose(results.read("lane-1-2")[row], second, atol=1e-6)


def test_layers_are_located(decoder: GraphOriginal, sets: tuple[str, str], tmp_path: Path) -> None:
    source = str(decoder.source.directory)
    located = locate(LocateOptions(source, tmp_path / "report", calibration=(sets[1],), pairs="0:1,1:2"))
    assert located is not None and set(located.evidence.sweep.pairs) == {(0, 1), (1, 2)}


def test_layers_left_open_are_found_on_one_half(
    decoder: GraphOriginal, sets: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With second lanes over as many tokens as the one that is written."""
    lanes, seen = GraphOriginal.lanes, set()

    def watched(self: GraphOriginal, settings: LaneSettings, **more: Any) -> Any:
        seen.add(settings.tokens)
        return lanes(self, settings, **more)

    monkeypatch.setattr(GraphOriginal, "lanes", watched)
    options = sasa_export.Options(
        model=str(decoder.source.directory), out=tmp_path / "out", calibration=(sets[1],), safety_layer="auto",
        semantic_layer=3, max_false_positive_rate=0.2, verify="files", lane_tokens=4,
    )  # fmt: skip
    patch = sasa_export.patch(options)
    assert patch.gate.semantic_layer == 3 and seen == {4}
    assert "found by a sweep over 3 pairs on one half of the calibration prompts" in patch.gate.layers_from
    assert patch.calibration is not None
    assert next(figure for figure in patch.calibration.figures if figure.part == "all").harmful == 20
