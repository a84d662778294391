"""docs/api.md is what `make api` writes."""

from pathlib import Path

import write_api


def test_the_page_is_of_this_code() -> None:
    written = Path(__file__).parents[2] / "docs" / "api.md"
    assert written.read_text(encoding="utf-8") == write_api.page(), "make api writes it again"
