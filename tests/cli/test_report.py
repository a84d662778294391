"""What a run says of itself: progress where there is no terminal to draw a bar on, and names as they are."""

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


def test_names_with_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets in a path are no markup."""
    console = report.Console()
    console.step("open", "models[/b]/x[red]: family")
    console.warn("models[/b]/x[red]")
    console.check(True, "a[/i]", "b[dim]")
    printed = capsys.readouterr().err
    assert printed.count("models[/b]/x[red]") == 2 and "✓ a[/i]: b[dim]" in printed
