"""What a long run says where there is no terminal to draw a bar on."""

import pytest

from sasa_export import report


def test_progress_in_a_log_file(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line every half minute with the time left, none in between, and none once all is done."""
    clock = iter([0.0, 10.0, 31.0, 32.0, 45.0, 62.0, 100.0])
    monkeypatch.setattr(report.time, "monotonic", lambda: next(clock))
    with report.Console().bar(100, "run prompts") as advance:
        for count in (10, 15, 5, 10, 20, 40):
            advance(count)
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert lines == ["run prompts: 25 of 100, about 2 min left", "run prompts: 60 of 100, about 1 min left"]


def test_a_short_run_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with report.Console().bar(3, "timing") as advance:
        for _ in range(3):
            advance(1)
    assert capsys.readouterr().err == ""
