"""Every link of the pages leads to a file that is there, and to a heading that it has."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)")


def pages() -> list[Path]:
    said = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return [ROOT / name for name in said.splitlines()] or sorted(ROOT.glob("docs/**/*.md"))


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = (re.sub(r"[^\w\- ]", "", title.lower()) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {title.strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, anchor in LINK.findall(text):
        if "://" not in target and not target.startswith("mailto:"):
            there = (page.parent / target).resolve() if target else page
            assert there.exists(), f"{page.name} leads to {target}"
            if anchor and there.suffix == ".md":
                assert anchor in anchors(there), f"{page.name} leads to {target}#{anchor}"
