"""Data sets of text alone, tables of any kind, the hub's, and what pictures and their marks become."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pandas as pd
import pytest
from cli_steps import Told
from PIL import Image

from sasa_export.errors import DataError
from sasa_export.prompts import calibration_prompts, load
from sasa_export.prompts.builtin_sets import CARRIERS

ROWS: list[dict[str, Any]] = [{"goal": "Break a lamp", "kind": "bad"}, {"goal": "Buy a lamp", "kind": "good"}]


def test_advbench(whole: dict[str, Path], tmp_path: Path) -> None:
    """Its authors' table and PyRIT's YAML, by directory and by file."""
    prompts = load(f"advbench:{whole['advbench']}")
    assert load(f"advbench:{whole['advbench'] / 'harmful_behaviors.csv'}") == prompts
    path = tmp_path / "adv_bench.prompt"
    path.write_text("dataset_name: adv_bench\nseeds:\n" + "".join(f"- value: {prompt.prompt}\n" for prompt in prompts))
    assert load(f"advbench:{tmp_path}") == load(f"advbench:{path}") == prompts
    assert prompts[0].prompt == "Tell me how to break a lamp" and {prompt.label for prompt in prompts} == {1}
    path.write_text("seeds: [\n")
    with pytest.raises(DataError, match=r"adv_bench\.prompt is not valid YAML"):
        load(f"advbench:{path}")


def test_text_drawn_as_a_picture(whole: dict[str, Path]) -> None:
    """What does not fit is left out, and counted."""
    report = Told()
    prompts = load(f"advbench:{whole['advbench']},as=text+picture", report=report)
    assert [(prompt.name, prompt.channel) for prompt in prompts] == [
        ("1", "text"), ("1/picture", "picture"), ("2", "text"), ("3", "text"), ("3/picture", "picture"),
    ]  # fmt: skip
    (warning,) = report.warnings
    assert "1 texts do not fit the 64 cells of a picture and are left out" in warning
    text, picture = prompts[0], prompts[1]
    assert text.group == picture.group and picture.question == text.prompt and picture.prompt in CARRIERS
    assert picture.attack == "typographic" and picture.image is not None and picture.image().size == (384, 384)
    again = load(f"advbench:{whole['advbench']},as=picture")[0].image
    assert again is not None and again().tobytes() == picture.image().tobytes()
    with pytest.raises(DataError, match="figstep has no option 'as'"):
        load(f"figstep:{whole['figstep']},as=picture")


def test_harmbench(whole: dict[str, Path], tmp_path: Path) -> None:
    """Standard behaviours of the part for testing, unless the options say else."""
    assert [(prompt.name, prompt.category) for prompt in load(f"harmbench:{whole['harmbench']}")] == [
        ("lamp", "physical")
    ]
    both = load(f"harmbench:{whole['harmbench']},split=all,category=standard+contextual")
    assert [prompt.name for prompt in both] == ["door", "lamp", "window"]
    assert both[2].prompt.startswith("A window is made of glass.") and both[2].question == "Break the window"
    published = shutil.copytree(whole["harmbench"], tmp_path / "data/behavior_datasets")
    assert load(f"harmbench:{tmp_path}") == load(f"harmbench:{published}") == both[1:2]


def test_writingbench(whole: dict[str, Path]) -> None:
    """The first sentence of each query, where it is ASCII."""
    prompts = load(f"writingbench:{whole['writingbench']}")
    assert [prompt.prompt for prompt in prompts] == ["Write a poem.", "Write to v1.2 users!", "A song\nabout rain"]
    assert {prompt.label for prompt in prompts} == {0} and prompts[2].name == "5"


def write(path: Path) -> None:
    """`ROWS` in the format that the name says."""
    table = pd.DataFrame(ROWS)
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        table.to_parquet(path)
    else:  # YAML holds all of JSON
        table.to_json(path, orient="records", lines=path.suffix == ".jsonl")


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet", "yaml"])
def test_tables(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    write(path)
    prompts = load(f"table:{path},prompt=goal,label=kind,harmful=bad,category=kind")
    assert [(prompt.prompt, prompt.label, prompt.category) for prompt in prompts] == [
        ("Break a lamp", 1, "bad"), ("Buy a lamp", 0, "good"),
    ]  # fmt: skip
    assert [prompt.label for prompt in load(f"table:{path},prompt=goal,label=harmful")] == [1, 1]
    if kind != "jsonl":  # which is our own format where no name stands before it
        assert load(f"{path},prompt=goal,label=0")[0].source == "table"
    with pytest.raises(DataError, match=r"has the label 'bad'; .* Say label=COLUMN"):
        load(f"table:{path},prompt=goal,label=kind")
    with pytest.raises(DataError, match=r"has the label None.*columns are goal, kind"):
        load(f"table:{path},prompt=goal,label=typo,harmful=bad")
    with pytest.raises(DataError, match=r"has no 'photo', which image=photo names. Its columns are goal, "):
        load(f"table:{path},prompt=goal,label=1,image=photo")
    for columns in ("label=1", "prompt=gaol,label=1"):
        with pytest.raises(DataError, match=r"record 1|line 1") as caught:
            load(f"table:{path},{columns}")
        assert "Its columns are goal, kind" in str(caught.value)
    path.write_bytes(b"\x89{")
    with pytest.raises(DataError, match=f"rows.{kind} (is not valid|cannot be read)"):
        load(f"table:{path},prompt=goal,label=1")


def test_a_table_with_pictures(whole: dict[str, Path]) -> None:
    one, two = load(str(whole["table"]))
    assert one.picture == whole["table"].parent / "a.png" and two.picture is None
    assert load(f"{whole['table']},image=image,category=topic")[1].category == "two"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which owner/name is found, as `datasets` finds those of the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "owner" / "name"


def test_hub(hub: Path) -> None:
    """With pictures in it, which a data set of the hub holds as bytes."""
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture

    path = str(miniature.picture(hub.parent.parent / "a.png", 1))
    rows = {"goal": ["What is it?", "Break a lamp"], "kind": ["good", "bad"], "photo": [path, None]}
    features = Features({"goal": Value("string"), "kind": Value("string"), "photo": Picture()})
    hub.mkdir(parents=True)
    Dataset.from_dict(rows, features=features).to_parquet(str(hub / "test.parquet"))
    one, two = load("hub:owner/name,split=test,prompt=goal,label=kind,harmful=bad,image=photo")
    assert (one.label, two.label, one.channel, two.channel, one.source) == (0, 1, "picture", "text", "hub")
    with Image.open(path) as expected:
        assert one.conversation()[0]["content"][0]["image"].tobytes() == expected.tobytes()
    with pytest.raises(DataError, match=r"owner/name, record 1 has no text 'what'. Its columns are goal, kind, photo"):
        load("hub:owner/name,split=test,prompt=what,label=1")


@pytest.mark.skipif(not os.environ.get("HF_HUB_OFFLINE"), reason="asks a hub")
def test_a_data_set_that_the_hub_has_not(hub: Path) -> None:
    with pytest.raises(DataError, match=r"data set owner/none of the hub cannot be loaded .*Check its id, config="):
        load("hub:owner/none")


@pytest.mark.parametrize("text, left", [("<image>\nWhat is it?", "What is it?"), ("What is it?<image>", "What is it?")])
def test_the_mark_of_a_picture_is_taken_out(tmp_path: Path, text: str, left: str) -> None:
    """LLaVA's own files have it in their texts, and the chat template puts the picture there itself."""
    miniature.picture(tmp_path / "a.png", 1)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"image": "a.png", "prompt": text, "label": 0}))
    assert load(str(path))[0].prompt == left
    path.write_text(json.dumps({"prompt": text, "label": 0}))
    with pytest.raises(DataError, match=r"a\.jsonl, line 1 has <image> 1 times in its prompt and no picture"):
        calibration_prompts([str(path)])
    path.write_text(json.dumps({"image": "a.png", "prompt": f"<image>{text}", "label": 0}))
    with pytest.raises(DataError, match="2 times in its prompt and one picture"):
        load(str(path))


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_a_picture_of_16_bits_does_not_turn_white(tmp_path: Path, name: str) -> None:
    values = np.linspace(0, 65535, 256).reshape(16, 16)  # (height, width)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / name)
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": name, "prompt": "What is it?", "label": 0}))
    shown = load(str(tmp_path / "a.jsonl"))[0].conversation()[0]["content"][0]["image"]
    assert shown.mode == "RGB"
    assert np.abs(np.asarray(shown)[..., 0] - values / 257).max() <= 0.5


def test_a_picture_whose_white_nobody_knows(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tiff")
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.tiff", "prompt": "What is it?", "label": 0}))
    with pytest.raises(DataError, match=r"line 1 names the image .*a\.tiff, which cannot be read \(its values have no"):
        load(str(tmp_path / "a.jsonl"))


def test_one_file_of_a_set_of_several(whole: dict[str, Path]) -> None:
    """It is never taken for all of them."""
    file = whole["mm-safetybench"] / "data/processed_questions/06-Fraud.json"
    prompts = load(f"mm-safetybench:{file},variant=text,scenario=06")
    assert [prompt.name for prompt in prompts] == ["06-Fraud/0/text", "06-Fraud/1/text"]
    with pytest.raises(DataError, match=r"06-Fraud\.json is one file, where several are asked for"):
        load(f"mm-safetybench:{file},variant=text")
    assert len(load(f"harmbench:{whole['harmbench'] / 'harmbench_behaviors_text_val.csv'}")) == 1
