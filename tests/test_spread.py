"""`--device spread`: a model larger than the memory that there is runs from the disk, to the same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate.utils.modeling
import pytest
import transformers.integrations.accelerate
from safetensors.numpy import load_file
from test_evaluate import write_set

import sasa_export
from sasa_export.models import memory, open_source
from sasa_export.models.load import SPREAD, load_model, running
from sasa_export.research.evaluate import EvaluateOptions, evaluate
from sasa_export.research.locate import LocateOptions, locate

pytestmark = pytest.mark.xdist_group("llava")

ROOM = 1_000  # bytes: not even the first weights fit


@pytest.fixture(scope="module")
def scarce() -> Any:
    """A function that leaves no room for a tiny model, until it is called again with False."""
    patch = pytest.MonkeyPatch()

    def less(on: bool = True) -> None:
        patch.undo()
        if on:
            for module in (accelerate.utils.modeling, transformers.integrations.accelerate):
                patch.setattr(module, "get_max_memory", lambda given=None: {"cpu": ROOM})

    yield less
    patch.undo()


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("sets")
    return str(write_set(folder, "evaluation", 1, 6)), str(write_set(folder, "calibration", 2, 20))


@pytest.fixture(scope="module")
def both(
    tiny_model: Callable[..., Path], sets: tuple[str, str], scarce: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Patched, located and evaluated, in memory and on disk: folders that hold all three."""
    place, model = tmp_path_factory.mktemp("spread"), tiny_model("llava")
    folders = {}
    for device in ("cpu", SPREAD):
        out = folders[device] = place / device
        scarce(device == SPREAD)
        sasa_export.patch(
            sasa_export.Options(
                model=str(model), out=out / "patched", calibration=(sets[1],), safety_layer=2, semantic_layer=4,
                device=device, max_false_positive_rate=0.1,
            )
        )  # fmt: skip
        locate(
            LocateOptions(
                model=str(model), out=out / "located", calibration=(sets[1],), pairs="2:4,1:3", ablation_prompts=2,
                device=device,
            )
        )  # fmt: skip
        evaluate(
            EvaluateOptions(
                model=out / "patched", baseline=str(model), out=out / "evaluated", data=(sets[0],),
                calibration=(sets[1],), max_new_tokens=8, timing=0, device=device,
            )
        )  # fmt: skip
    scarce(False)
    return folders


def test_the_weights_lie_on_disk(tiny_model: Callable[..., Path], scarce: Any) -> None:
    scarce()
    model = load_model(open_source(str(tiny_model("llava"))), dtype="float32", device=SPREAD)
    scarce(False)
    assert set(model.hf_device_map.values()) == {"disk"}
    assert all(parameter.is_meta for parameter in model.parameters())


def test_the_probe_is_the_same(both: dict[str, Path]) -> None:
    one, other = (load_file(folder / "patched" / "model-00002-of-00002.safetensors") for folder in both.values())
    assert one.keys() == other.keys() and "sasa.probe.weight" in one
    assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize("report", ["located/locate.json", "evaluated/evaluate.json"])
def test_the_figures_are_the_same(both: dict[str, Path], report: str) -> None:
    one, other = (json.loads((folder / report).read_text()) for folder in both.values())
    assert plain(one) == plain(other)


@pytest.mark.parametrize(("free", "device"), [(10_000, SPREAD), (10**9, "cpu")])
def test_auto_spreads_what_one_device_has_no_room_for(
    free: int, device: str, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: free)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    source = open_source(str(tiny_model("llava")))
    assert running(source, sasa_export.Options(model="llava", out=tmp_path / "out"))[1] == device


def plain(value: Any) -> Any:
    """A report without what names devices and folders."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in ("device", "out", "command", "model")}
    return [plain(item) for item in value] if isinstance(value, list) else value
