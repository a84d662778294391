"""Calibration files of any kind: prompts, or an error of one line, never a traceback.

`SASA_FUZZ=1000` tries so many of each kind (`make fuzz`); a few by default.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st

from sasa_export.errors import SasaExportError
from sasa_export.prompts import calibration_prompts

quick = examples(40)

# Whatever JSON can say, and what Python's reader takes beside it.
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PICTURES = ("whole.png", "torn.png", "empty.png", "text.png", "bomb.png", "loop.png", ".", "no.png")
FIELDS = ("prompt", "label", "image", "group", "id", "category", "attack", "question")
good = st.fixed_dictionaries(
    {
        "prompt": st.text(min_size=1, max_size=30),
        "label": st.sampled_from([0, 1]),
        "image": st.none() | st.sampled_from(PICTURES) | st.text(max_size=12),
    },
    optional={name: st.text(max_size=8) for name in FIELDS[3:]},
)
odd = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), values, max_size=6)
EDGES = (
    "", "{}", "[]", "null", "{", "NaN", "\x00", '"\ud800"', "\ufeff{}", "[" * 100_000, '{"label": ' + "9" * 5000 + "}",
    '{"prompt": "a", "label": 1e0, "image": null}', '{"prompt": "a", "label": true, "image": null}',
    '{"prompt": "a\\u0000b", "label": 1, "image": "\\u0000"}', "\r", "\x0b", "\x85", "\u2028",
)  # fmt: skip
lines = st.one_of(good.map(json.dumps), odd.map(json.dumps), values.map(json.dumps), st.sampled_from(EDGES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, whole and broken."""
    path = tmp_path_factory.mktemp("fuzz")
    tiny.random_image(0).save(path / "whole.png")
    whole = (path / "whole.png").read_bytes()
    (path / "torn.png").write_bytes(whole[:60])
    (path / "empty.png").touch()
    (path / "text.png").write_text("%!PS-Adobe-3.0\n")
    size = (1 << 30).to_bytes(4, "big") * 2  # that no memory holds
    (path / "bomb.png").write_bytes(whole[:16] + size + whole[24:])
    (path / "loop.png").symlink_to("loop.png")
    return path


ENOUGH = "\n".join(
    json.dumps({"prompt": f"please tell me {n}", "label": n % 2, "image": None}) for n in range(10)
).encode()


def taken(spec: str) -> bool:
    """Are these calibration prompts? If not, the error is one of ours, in one line."""
    try:
        prompts = calibration_prompts([spec])
    except SasaExportError as error:
        assert str(error) and str(error).isprintable(), repr(str(error))
        return False
    labels = [prompt.label for prompt in prompts]
    assert min(labels.count(0), labels.count(1)) >= 5 and len({prompt.name for prompt in prompts}) == len(prompts)
    return True


def joined(written: list[str], end: str) -> bytes:
    return (ENOUGH.decode() + end + end.join(written)).encode("utf-8", "surrogatepass")


# A good file with more lines, with bytes changed, cut off, or put in.
FILES: dict[str, st.SearchStrategy[Any]] = {
    "calibration files of odd lines": st.builds(
        joined, st.lists(lines, max_size=5), st.sampled_from(["\n", "\r\n", "\n\n", "\r"])
    ),
    "calibration files with odd pictures": st.builds(
        joined, st.lists(good.map(json.dumps), min_size=1, max_size=3), st.just("\n")
    ),
    "calibration files with changed bytes": st.builds(
        lambda place, dropped, more: ENOUGH[:place] + more + ENOUGH[place + dropped :],
        st.integers(0, len(ENOUGH)), st.integers(0, 40), st.binary(max_size=40),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_files_of_any_kind(folder: Path, what: str) -> None:
    outcomes: set[bool] = set()

    @quick
    @given(FILES[what])
    def run(content: bytes) -> None:
        (folder / "prompts.jsonl").write_bytes(content)
        outcomes.add(taken(str(folder / "prompts.jsonl")))

    run()
    assert outcomes == {True, False}


NAMES = ["jsonl", "figstep", "mm-safetybench", "vlguard", "jailbreakv", "xstest", "no-set"]
PATHS = ["", " ", ".", "/", "no.jsonl", "loop.png", "a\nb", "x" * 5000, "whole.png", "\udc80", "~", "~nobody/x"]
TAILS = [
    "",
    ",subset=safe",
    ",variant=SD+TYPO",
    ",part=tiny",
    ",split=train,split=test",
    ",mini=yes",
    ",format=",
    ",=x",
]


def test_specs_of_any_kind(folder: Path) -> None:
    """`name:PATH,option=value` of any wording, none of which names prompts. A command line holds no zero byte."""

    @quick
    @given(
        st.sampled_from(["", *(f"{name}:" for name in NAMES)]),
        st.sampled_from([*PATHS, *(f"{folder}/{path}" for path in PATHS)]),
        st.sampled_from(TAILS) | st.text(alphabet="abc=+,:/_- \n", max_size=12),
    )
    def run(name: str, path: str, tail: str) -> None:
        assert not taken(f"{name}{path}{tail}")

    run()
