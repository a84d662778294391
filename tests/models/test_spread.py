"""`--device spread`: a model larger than the memory that there is runs from the disk, to the same numbers."""

from collections.abc import Callable
from pathlib import Path

import accelerate.utils.modeling
import pytest
import transformers.integrations.accelerate
from cli_steps import contents, flags, succeeds

from sasa_export.models import load, open_source
from sasa_export.models.load import SPREAD, load_model, running


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Leaves too little memory for a tiny model, once it is called."""

    def less() -> None:
        for module in (accelerate.utils.modeling, transformers.integrations.accelerate):
            monkeypatch.setattr(module, "get_max_memory", lambda given=None: {"cpu": 1000})  # bytes

    return less


def test_the_weights_lie_on_disk(llava: Path, scarce: Callable[[], None]) -> None:
    scarce()
    model = load_model(open_source(str(llava)), dtype="float32", device=SPREAD)
    assert set(model.hf_device_map.values()) == {"disk"}
    assert all(parameter.is_meta for parameter in model.parameters())


def test_what_is_written_is_the_same(llava: Path, calibration: Path, place: Path, scarce: Callable[[], None]) -> None:
    """Calibrated from the disk, a model gets the same probe and the same scores."""
    for device in ("cpu", SPREAD):
        if device == SPREAD:
            scarce()
        options = {"calibration": calibration, "max_false_positive_rate": 0.3, "verify": "files", "device": device}
        succeeds(*flags(llava, place / device, **options))
    assert contents(place / "cpu") == contents(place / SPREAD)


@pytest.mark.parametrize(("free", "device"), [(10_000, SPREAD), (10**9, "cpu")])
def test_auto_spreads_what_one_device_is_too_small_for(
    free: int, device: str, llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "available_memory", lambda: free)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert running(open_source(str(llava)), "auto", "auto") == ("float32", device)
