"""`sasa-export score`: the numbers of `judge` and of the graphs, a summary, and a threshold that is proposed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from cli_steps import fails, succeeds

from sasa_export.errors import EvaluateError
from sasa_export.onnx.run import Model
from sasa_export.prompts import load
from sasa_export.prompts.prompt import encode
from sasa_export.research.score import _propose, score
from sasa_export.verify import verify_directory

COUNT = 13


@pytest.fixture(scope="session")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and pictures without a label, and one with a label and a name."""
    folder = tmp_path_factory.mktemp("traffic")
    lines: list[dict[str, Any]] = [{"prompt": f"how do I bake {number} cakes"} for number in range(COUNT)]
    for number in range(0, COUNT, 3):
        tiny.random_image(number).save(folder / f"{number}.png")
        lines[number]["image"] = f"{number}.png"
    lines[5] |= {"id": "five", "label": 1}
    (folder / "traffic.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "traffic.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_scores_are_those_of_judge(guard: Callable[..., Any], traffic: Path, tmp_path: Path, family: str) -> None:
    guarded = guard(family)
    found = score(guarded.directory, str(traffic), tmp_path / "scored.jsonl", batch_size=4)
    prompts = load(str(traffic), labelled=False)
    alone = [guarded.model.judge(**encode(guarded.processor, [prompt])).item() for prompt in prompts]
    np.testing.assert_allclose(found.probabilities, alone, rtol=0, atol=1e-5)
    lines, threshold = read(tmp_path / "scored.jsonl"), guarded.model.config.sasa["threshold"]
    assert [line["id"] for line in lines] == [f"line {n}" if n != 6 else "five" for n in range(1, COUNT + 1)]
    assert [line["probability"] for line in lines] == found.probabilities.tolist()
    assert all((line["verdict"] == "refused") == (line["probability"] >= threshold) for line in lines)


@pytest.mark.xdist_group("onnx-llava")
def test_scores_of_graphs_are_theirs(
    split: Callable[..., Any], exported: Callable[..., Path], traffic: Path, tmp_path: Path
) -> None:
    guarded = split("llava")
    graphs = exported(guarded.directory)
    found = score(graphs, str(traffic), tmp_path / "scored.jsonl")
    model = Model(graphs)
    for prompt, probability in zip(found.prompts, found.probabilities, strict=True):
        inputs = {name: tensor.numpy() for name, tensor in encode(model.processor, [prompt]).items()}
        assert model.judge(inputs) == probability
    torch_found = score(guarded.directory, str(traffic), tmp_path / "torch.jsonl")
    np.testing.assert_allclose(found.probabilities, torch_found.probabilities, rtol=0, atol=1e-4)
    said = fails("score", str(graphs), str(traffic), "--out", str(tmp_path / "more.jsonl"), "--refuse-at-most", "0.1",
                 "--write-threshold")  # fmt: skip
    assert "the threshold lies within the graphs" in said and "export them again with --threshold" in said


def test_a_threshold_is_proposed_and_written(guard: Callable[..., Any], traffic: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(guard("llava").directory, tmp_path / "patched")
    before = (directory / "config.json").read_text()
    command = ("score", str(directory), str(traffic), "--refuse-at-most", "0.2", "--batch-size", "3", "--out")
    said = succeeds(*command, str(tmp_path / "first.jsonl")).stdout.splitlines()
    assert (directory / "config.json").read_text() == before
    assert said[0].startswith(f"{COUNT} prompts, ") and len(said) == 12
    assert sum("<- threshold" in line for line in said) == 1
    assert sum(int(line.split()[3]) for line in said[1:11]) == COUNT
    assert " would refuse 2: 15.4%" in said[11], "a fifth of 13 is 2.6 prompts"
    result = succeeds(*command, str(tmp_path / "second.jsonl"), "--write-threshold")
    threshold = json.loads((directory / "config.json").read_text())["sasa"]["threshold"]
    assert f"threshold {threshold:.6g} stands in" in result.stderr
    again = score(directory, str(traffic), tmp_path / "third.jsonl")
    assert again.threshold == threshold and again.refused(threshold).count == 2
    assert [line["verdict"] for line in read(tmp_path / "third.jsonl")].count("refused") == 2
    manifest = verify_directory(directory, only_files=True)[0]
    assert manifest.passed and "with settings as the operator changed them" in manifest.detail


@pytest.mark.parametrize(
    "line, flags, said",
    [
        ("{}", (), "line 1 has an empty prompt and no image"),
        ('{"texts": "a"}', (), "unknown key 'texts'. Did you mean 'text'?"),
        ('{"prompt": "a"}', ("--write-threshold",), "--write-threshold has no effect without --refuse-at-most"),
        ('{"prompt": "a"}', ("--out", "{place}/none/scored.jsonl"), "is no directory"),
        ('{"prompt": "a"}', ("--out", "{place}/data.jsonl"), "data.jsonl is there already"),
    ],
)
def test_what_cannot_be_scored(guard: Callable[..., Any], place: Path, line: str, flags: Any, said: str) -> None:
    data = place / "data.jsonl"
    data.write_text(line)
    more = [flag.format(place=place) for flag in flags]
    assert said in fails("score", str(guard("llava").directory), str(data), "--out", str(place / "scored.jsonl"), *more)
    assert list(place.iterdir()) == [data] and data.read_text() == line


def test_a_model_without_a_gate_is_not_scored(llava: Path, traffic: Path, place: Path) -> None:
    said = fails("score", str(llava), str(traffic), "--out", str(place / "scored.jsonl"))
    assert "is no patched model" in said


def test_no_threshold_refuses_as_few() -> None:
    """What is said names an option that `score` has."""
    with pytest.raises(EvaluateError, match="Raise --refuse-at-most"):
        _propose(np.ones(5), 0.1)
